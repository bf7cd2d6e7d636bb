"""Launch parameters of the attention kernels: pure functions of shapes, dtypes and device properties.

Everything here can be computed and tested on a machine without a GPU.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch_paged.kernels.features import PLAIN_FEATURES, Features, Stored

WORKSPACE_LIMIT = 64 * 2**20  # bytes


def next_power_of_two(number: int) -> int:
    """Smallest power of two that is at least `number` (>= 1)."""
    return 1 << (number - 1).bit_length()


def split_dim(dim: int, narrowest: int = 16) -> tuple[int, int]:
    """Widths of the one or two power-of-two pieces that cover `dim` (>= 16) columns; the second may be 0.

    96 is 64 + 32 and 576 is 512 + 64: no tile is padded to 128 or 1024. 112 is 128, as 64 + 64 would save nothing.
    A second piece of 16 columns would make the compiler repeat a product of 16 rows in every warp: it has 32 or more.
    """
    wide = 1 << (max(dim, narrowest).bit_length() - 1)
    if wide >= dim:
        return wide, 0
    rest = max(next_power_of_two(dim - wide), 32, narrowest)
    return (2 * wide, 0) if wide + rest >= 2 * wide else (wide, rest)


@dataclass(frozen=True)
class Device:
    """What a launch needs to know of a device."""

    multiprocessors: int
    shared_memory: int  # bytes of one multiprocessor that thread blocks can use
    capability: int = 90  # 10 * major + minor
    amd: bool = False


@dataclass(frozen=True)
class Problem:
    """The shapes and layout of one attention call, without any length."""

    num_tokens: int
    num_seqs: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    block_size: int
    itemsize: int
    causal: bool
    ragged: bool  # cu_seqlens_q is given
    aligned: bool = True  # every row of query and caches starts at a multiple of 16 bytes
    shared_values: bool = False  # value_cache is key_cache[..., :value_dim]
    features: Features = PLAIN_FEATURES

    @property
    def plain(self) -> bool:
        """Whether no option is given and the caches hold query's dtype."""
        return self.features == PLAIN_FEATURES

    @property
    def plain_caches(self) -> bool:
        """Whether both caches hold query's dtype."""
        return not (self.features.key.dtype or self.features.value.dtype)

    @property
    def key_itemsize(self) -> int:
        """Bytes of a stored number."""
        return 1 if self.features.key.dtype else self.itemsize

    @property
    def value_itemsize(self) -> int:
        """Bytes of a stored number."""
        return 1 if self.features.value.dtype else self.itemsize

    copyable: bool = True  # the copy engine of Hopper can address every row of the caches


@dataclass(frozen=True)
class Variant:
    """What the kernels are compiled for. Neither lengths nor batch nor table width are among it.

    Everything that a kernel reads is a field, as the compiler's cache on disk goes by the printed fields.
    """

    group: int  # query heads of one KV head
    head_dim: int
    value_dim: int
    key_widths: tuple[int, int]  # power-of-two pieces of a key row
    value_widths: tuple[int, int]
    value_width: int  # a value row in one piece
    block_size: int
    paging: str  # see `_paging`
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
    unit_rows: int  # most rows that a unit holds
    combine_rows: int  # rows of a unit that one program combines
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

    @property
    def combine_programs(self) -> int:
        """Programs that combine the rows of one unit."""
        return -(-self.unit_rows // self.combine_rows)

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


class Tiles(NamedTuple):
    """Shape of a program's work."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    resident: int  # programs that the registers of one multiprocessor hold


ALL_ROWS = 2**31 - 1
FEW_ROWS = 64
MANY_ROWS = 128
HOPPER_DIMS = {64, 128, 256}
HOPPER_REGISTERS = 168  # of a thread before loader and warpgroups trade theirs


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
    copy_rows = _copy_rows(problem, device, rows)
    tiles = _hopper_tiles(problem) if copy_rows else _fit(problem, device, _tiles(problem, device, rows))
    narrowest = _narrowest_piece(problem, device, tiles)
    group = problem.num_heads // problem.num_kv_heads
    value_pairs = _loads_pairs(problem, tiles)
    variant = Variant(
        group=group,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        key_widths=split_dim(problem.head_dim, narrowest),
        value_widths=(problem.value_dim // 2,) * 2 if value_pairs else split_dim(problem.value_dim, narrowest),
        value_width=next_power_of_two(problem.value_dim),
        block_size=problem.block_size,
        paging=_paging(problem.block_size, tiles.keys),
        causal=problem.causal,
        ragged=problem.ragged,
        aligned=problem.aligned,
        shared_values=_shares_tiles(problem, narrowest),
        value_pairs=value_pairs,
        block_m=tiles.rows,
        tile=tiles.keys,
        num_stages=tiles.num_stages,
        single_tile=above < 0 and rows <= tiles.rows and not copy_rows,
        unmasked_first=rows > FEW_ROWS,
        rows_above=above,
        rows_upto=upto,
        unit_cost=(4 if rows > FEW_ROWS else 2) * tiles.keys * group,
        least_work=2 * tiles.keys * group,
        precision="ieee",
        has=_features(problem.features, device),
        overlap=device.capability >= 90 and not device.amd,
        copy_rows=copy_rows,
    )
    combine_rows = 1 if tiles.rows <= 16 else 4
    slots = WORKSPACE_LIMIT // (2 * tiles.rows * (problem.value_dim + 2) * 4)
    return AttentionLaunch(
        variant=variant,
        num_warps=tiles.num_warps,
        max_registers=HOPPER_REGISTERS if copy_rows else _max_registers(problem, device, tiles),
        programs=max(1, min(device.multiprocessors * tiles.resident, slots)),
        unit_rows=tiles.rows if problem.ragged else min(rows, tiles.rows),
        combine_rows=combine_rows,
        combine_parts=max(2, min(32, 4096 // variant.value_width)) if combine_rows == 1 else 1,
    )


def _features(features: Features, device: Device) -> Features:
    """`features` as `device` serves them: NVIDIA's have instructions for e4m3 from compute capability 8.9 on."""

    def served(stored: Stored) -> Stored:
        if device.capability >= 89 and not device.amd:
            return replace(stored, packed=bool(stored.dtype))
        return replace(stored, dtype="e4m3 bits") if stored.dtype == "e4m3" else stored

    return replace(features, key=served(features.key), value=served(features.value))


def _copy_rows(problem: Problem, device: Device, rows: int) -> int:
    """Keys of one copy where `attention_hopper` serves sequences of `rows` rows: a block, or a tile of one; 0: not."""
    dims = {problem.head_dim, problem.value_dim}
    hopper = device.capability == 90 and not device.amd
    served = problem.plain and problem.copyable and problem.itemsize == 2 and dims <= HOPPER_DIMS
    if not hopper or rows <= FEW_ROWS or not served:
        return 0
    tile, block = _hopper_tiles(problem).keys, problem.block_size
    fits = block % tile == 0 or (tile % block == 0 and block >= 8)
    return min(tile, block) if fits else 0


def _hopper_tiles(problem: Problem) -> Tiles:
    """Tiles of `attention_hopper`: two warpgroups of 64 rows, several buffers each for keys and for values."""
    width = max(problem.head_dim, problem.value_dim)
    return Tiles(MANY_ROWS, 64 if width > 128 else 128, 4, {64: 4, 128: 3, 256: 2}[width], 1)


def _max_registers(problem: Problem, device: Device, tiles: Tiles) -> int | None:
    """Registers of a thread, where telling the assembler was seen to spare it a spill; elsewhere it caused some."""
    if device.amd:
        return None
    if problem.itemsize == 4:
        return 128 if tiles.rows == 32 else None
    if tiles.num_warps > 4:
        return None
    return min(65536 // (32 * tiles.num_warps * tiles.resident) // 8 * 8, 255)


def _narrowest_piece(problem: Problem, device: Device, tiles: Tiles) -> int:
    """Columns that a piece of a row has at least.

    Where values pass through registers on their way to Hopper's wgmma, NVIDIA's assembler (12.8) was seen to compute
    the addresses of pieces of 32 columns before it knows where they begin.
    """
    through_registers = not (problem.plain_caches and problem.aligned)
    return 64 if device.capability == 90 and not device.amd and tiles.rows >= 64 and through_registers else 16


def _shares_tiles(problem: Problem, narrowest: int) -> bool:
    """Whether a tile of keys, as it was loaded, holds the values too."""
    first_of_key, first_of_value = (split_dim(dim, narrowest)[0] for dim in (problem.head_dim, problem.value_dim))
    return problem.shared_values and first_of_key == first_of_value


def _loads_pairs(problem: Problem, tiles: Tiles) -> bool:
    """Whether stored values come in pairs: tensor cores take them across rows, which bytes could do one by one only."""
    dim = problem.value_dim
    halves = dim >= 32 and dim & (dim - 1) == 0
    narrow = problem.value_itemsize == 1 and problem.itemsize == 2
    return narrow and halves and problem.aligned and tiles.rows <= 16 and not problem.shared_values


def _paging(block_size: int, tile: int) -> str:
    """How the keys of a tile are found: in "one" block, in "several" whole ones, or key by key ("any")."""
    if block_size & (block_size - 1) or block_size == 1:
        return "any"
    return "one" if block_size >= tile else "several"


def _tiles(problem: Problem, device: Device, rows: int) -> Tiles:
    """The largest tiles that were seen to compile without spilling registers."""
    width = max(problem.head_dim, problem.value_dim)
    many = rows > FEW_ROWS
    if problem.itemsize == 4:
        by_blocks = _paging(problem.block_size, 32) != "any"
        keys, warps = (32, 4) if width <= 128 and problem.plain_caches and by_blocks else (16, 8)
        many = many and width <= 256 and problem.plain_caches
        return Tiles(32, keys, 8, 2, 1) if many else Tiles(16, keys, warps, 3, 8 // warps)
    keys = 128 if width <= 64 else 64 if width <= 128 else 32
    if rows <= 16:
        return Tiles(16, keys if width <= 256 else 16, 4, 3, 2)
    # Hopper would hold query rows in registers where these are brought into float16's range.
    if width > 256 or (width > 128 and device.capability == 90 and not problem.plain_caches):
        return Tiles(32, 16, 8, 3, 1)
    if many:
        # Only Hopper keeps the operands of its products out of registers and the results in as few as it can.
        fewer = device.capability != 90 or (width > 128 and _paging(problem.block_size, keys) == "any")
        # Before Hopper, numbers are widened in registers.
        fewer_rows = width > 128 or (device.capability < 90 and not problem.plain_caches)
        rows = FEW_ROWS if device.capability != 90 and fewer_rows else MANY_ROWS
        return Tiles(rows, min(keys, 64) if fewer else keys, 8, 2 if fewer else 3, 1)
    return Tiles(FEW_ROWS, keys, 4, 3, 2) if width <= 128 else Tiles(FEW_ROWS, keys, 8, 3, 1)


def _fit(problem: Problem, device: Device, tiles: Tiles) -> Tiles:
    """`tiles` with fewer stages, then fewer keys, until shared memory holds as many of them as the registers do."""
    limit = device.shared_memory if device.amd else device.shared_memory // tiles.resident
    while _shared_memory(problem, device, tiles) > limit and (tiles.num_stages > 1 or tiles.keys > 16):
        if tiles.num_stages > 1:
            tiles = tiles._replace(num_stages=tiles.num_stages - 1)
        else:
            tiles = tiles._replace(keys=tiles.keys // 2)
    return tiles


def _shared_memory(problem: Problem, device: Device, tiles: Tiles) -> int:
    """Bytes of shared memory that the compiler was seen to use, or a little more."""
    narrowest = _narrowest_piece(problem, device, tiles)
    keys, values = sum(split_dim(problem.head_dim, narrowest)), sum(split_dim(problem.value_dim, narrowest))
    row = keys * problem.key_itemsize + (0 if _shares_tiles(problem, narrowest) else values * problem.value_itemsize)
    # From Hopper on, products of many rows read their operands from shared memory while the next tile is loaded.
    from_shared = tiles.rows >= 64 and device.capability >= 90 and not device.amd
    buffers = max(tiles.num_stages - 1 + from_shared, 1)
    return buffers * tiles.keys * row + tiles.rows * (keys + tiles.keys) * problem.itemsize + 1024
