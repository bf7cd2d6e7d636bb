"""Launch parameters of the attention kernels: pure functions of shapes, dtypes and device properties.

Everything here can be computed and tested on a machine without a GPU.
"""

import functools
from dataclasses import dataclass, replace

from torch_paged.kernels.features import Features, Stored
from torch_paged.kernels.launch_tiles import (
    FEW_ROWS,
    MANY_ROWS,
    Tiles,
    copy_rows,
    hopper_registers,
    loads_pairs,
    max_registers,
    narrowest_piece,
    paging,
    rounds,
    shares_tiles,
    tiles_of,
    unit_cost,
    unmasked_first,
)
from torch_paged.kernels.problem import Device, Problem, next_power_of_two, split_dim

ALL_ROWS = 2**31 - 1
WORKSPACE_LIMIT = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Variant:
    """What the kernels are compiled for. Lengths of sequences, batch size and table width are no part of it.

    Everything that a kernel reads is a field, as the compiler's cache on disk goes by the printed fields.
    """

    group: int  # query heads of one KV head
    head_dim: int
    value_dim: int
    key_widths: tuple[int, int]  # power-of-two pieces of a key row
    value_widths: tuple[int, int]
    value_width: int  # a value row in one piece
    block_size: int
    paging: str  # see `paging` in `launch_tiles`
    causal: bool
    ragged: bool
    aligned: bool
    shared_values: bool  # the first piece of a value row is that of the key row
    value_pairs: bool  # a value row's pieces are its even and its odd columns, loaded together as numbers of 16 bits
    block_m: int  # rows of a query tile: (query token, head of the group), packed
    tile: int  # keys of a tile
    num_stages: int
    single_tile: bool  # no sequence has more rows than one tile holds
    unmasked_first: bool  # a loop without masks over the tiles that every row sees, then one with masks
    rows_above: int  # serves the sequences of more rows than this ...
    rows_upto: int  # ... and at most as many as this
    unit_cost: int  # fixed cost of a unit, in keys times group
    resident: int  # programs on a multiprocessor
    least_work: int  # work below which a program's piece is not divided further, in keys times group
    precision: str  # of float32 products: "ieee" is true float32
    has: Features
    overlap: bool  # begins while the kernel before it ends, and waits for its results (Hopper and later)
    copy_rows: int  # keys that the copy engine of `attention_hopper` takes at a time; 0 in the general kernel


@dataclass(frozen=True)
class AttentionLaunch:
    """One launch of the attention kernel and of the one that combines its partial results."""

    variant: Variant
    num_warps: int
    max_registers: int | None  # of a thread; None leaves it to the compiler
    programs: int
    rounds: int  # in which its work is dealt out, at most
    unit_rows: int  # most rows that a unit holds
    combine_rows: int  # rows of a unit that one program combines, if not one
    combine_parts: int  # partial results that it reads at a time

    @property
    def options(self) -> dict[str, int]:
        """Compiler options of the attention kernel."""
        options = {"num_warps": self.num_warps} | self.overlap_option
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    @property
    def overlap_option(self) -> dict[str, int]:
        """The compiler option behind `Variant.overlap`, which some backends do not know."""
        return {"launch_pdl": True} if self.variant.overlap else {}

    def rows_combined(self, units: int) -> int:
        """Rows of a unit that one program combines: one, where few units of many rows are left in many parts."""
        several = self.variant.single_tile and self.variant.block_m > 16
        return 1 if several and 16 * units <= self.programs else self.combine_rows

    @property
    def padded_programs(self) -> int:
        """A power of two, as the width of a vector must be."""
        return next_power_of_two(self.programs)

    @property
    def partial_floats(self) -> int:
        """float32 workspace: per program two unfinished query tiles, each row with its maximum and its sum."""
        return 2 * self.programs * self.variant.block_m * (self.variant.value_dim + 2)

    @property
    def handoff_ints(self) -> int:
        """int32 workspace: what each program left unfinished."""
        return 3 * self.programs


@functools.lru_cache(maxsize=4096)
def attention_launches(problem: Problem, device: Device) -> tuple[AttentionLaunch, ...]:
    """Launches that together serve every sequence of the batch, each finding its own on the device.

    Uniform batches tell by their shape how many rows a sequence has. Ragged ones may hold any mixture: one launch
    serves the sequences of few rows (decode), one the others (prefill), unless there are not enough rows for both.
    """
    group = problem.num_heads // problem.num_kv_heads
    few = 16 if group <= 16 else FEW_ROWS
    if not problem.ragged:
        rows = problem.num_tokens // max(problem.num_seqs, 1) * group
        return (_launch(problem, device, rows, -1, ALL_ROWS),)
    if problem.num_tokens * group <= FEW_ROWS:
        return (_launch(problem, device, problem.num_tokens * group, -1, ALL_ROWS),)
    return (
        _launch(problem, device, MANY_ROWS, few, ALL_ROWS),
        _launch(problem, device, few, -1, few),
    )


def _launch(problem: Problem, device: Device, rows: int, above: int, upto: int) -> AttentionLaunch:
    """Launch for sequences of more than `above` and at most `upto` rows, made for `rows` of them."""
    tiles = tiles_of(problem, device, rows)
    variant = _variant(problem, device, tiles, rows, above, upto)
    # What combines has so many numbers of a part at a time, and as many parts as its registers hold.
    numbers, parts = (512, 16) if tiles.rows <= 16 else (1024, 8) if tiles.rows < MANY_ROWS else (2048, 2)
    slots = WORKSPACE_LIMIT // (2 * tiles.rows * (problem.value_dim + 2) * 4)
    programs = max(1, min(device.multiprocessors * tiles.resident, slots))
    return AttentionLaunch(
        variant=variant,
        num_warps=tiles.num_warps,
        max_registers=hopper_registers(tiles) if variant.copy_rows else max_registers(problem, device, tiles),
        programs=programs,
        rounds=rounds(problem, programs) if variant.copy_rows else 0,
        unit_rows=tiles.rows if problem.ragged else min(rows, tiles.rows),
        combine_rows=min(max(1, numbers // variant.value_width), tiles.rows),
        combine_parts=parts,
    )


def _variant(problem: Problem, device: Device, tiles: Tiles, rows: int, above: int, upto: int) -> Variant:
    """What the kernels of that launch are compiled for."""
    copied = copy_rows(problem, device, rows)
    narrowest = narrowest_piece(problem, device, tiles)
    group = problem.num_heads // problem.num_kv_heads
    return Variant(
        group=group,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        key_widths=split_dim(problem.head_dim, narrowest, 16 if copied else 32),
        value_widths=_value_widths(problem, tiles, copied, narrowest),
        value_width=next_power_of_two(problem.value_dim),
        block_size=problem.block_size,
        paging=paging(problem.block_size, tiles.keys),
        causal=problem.causal,
        ragged=problem.ragged,
        aligned=problem.aligned,
        shared_values=shares_tiles(problem, narrowest),
        value_pairs=loads_pairs(problem, tiles),
        block_m=tiles.rows,
        tile=tiles.keys,
        num_stages=tiles.num_stages,
        single_tile=above < 0 and rows <= tiles.rows and not copied,
        unmasked_first=unmasked_first(problem, device, tiles, rows),
        rows_above=above,
        rows_upto=upto,
        unit_cost=unit_cost(tiles, rows, copied) * tiles.keys * group,
        resident=tiles.resident,
        least_work=2 * tiles.keys * group,
        precision="ieee",
        has=_features(problem.features, device),
        overlap=device.capability >= 90 and not device.amd,
        copy_rows=copied,
    )


def _value_widths(problem: Problem, tiles: Tiles, copied: int, narrowest: int) -> tuple[int, int]:
    """Power-of-two pieces of a value row."""
    if loads_pairs(problem, tiles):
        return problem.value_dim // 2, problem.value_dim // 2
    # Two of Hopper's products take longer than one of 128 columns; its threads exchange results among 32 at least.
    if copied and problem.value_dim <= 128:
        return max(next_power_of_two(problem.value_dim), 32), 0
    return split_dim(problem.value_dim, narrowest)


def _features(features: Features, device: Device) -> Features:
    """`features` as `device` serves them: NVIDIA's have instructions for e4m3 from compute capability 8.9 on."""

    def served(stored: Stored) -> Stored:
        if device.capability >= 89 and not device.amd:
            return replace(stored, packed=bool(stored.dtype))
        return replace(stored, dtype="e4m3 bits") if stored.dtype == "e4m3" else stored

    return replace(features, key=served(features.key), value=served(features.value))
