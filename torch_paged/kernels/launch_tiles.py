"""Tiles of attention: how many rows, keys, warps and buffers a program has, and how many programs fit.

Found by compiling for every device that is shipped for: see `tests/aot_report.py`.
"""

import math
from typing import NamedTuple

from torch_paged.kernels.problem import Device, Problem, columns_of, split_dim

FEW_ROWS = 64
MANY_ROWS = 128
SHARED = 1024  # query tokens of a sequence, on average, from which on many programs read the same keys at a time,
LONG = 2048  # or units have many tiles of them
SHORT_WINDOW = 1024  # keys
KEPT_CLOSE = 40 * 10**6  # bytes of keys and values that Hopper's L2 cache, of 50 MB, keeps beside all that passes
MOST_ROUNDS = 6  # no more than MOST_TURNS of `alike`
MANY_UNITS = 128  # of decode: KV heads of all sequences


class Tiles(NamedTuple):
    """Shape of a program's work."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    resident: int  # programs that the registers of one multiprocessor hold


def tiles_of(problem: Problem, device: Device, rows: int) -> Tiles:
    """What serves sequences of `rows` rows."""
    if copy_rows(problem, device, rows):
        return _hopper_tiles(problem)
    return _fit(problem, device, _largest_tiles(problem, device, rows))


def copy_rows(problem: Problem, device: Device, rows: int) -> int:
    """Keys of one copy where `attention_hopper` serves sequences of `rows` rows: a block or a part of it; 0: not."""
    numbers = problem.plain_caches and problem.itemsize == 2 and problem.aligned and problem.copyable
    dims = _padded_width(problem) <= 256 and problem.head_dim % 8 == problem.value_dim % 8 == 0
    if not (device.hopper and rows > FEW_ROWS and numbers and dims and not problem.features.alibi):
        return 0
    copied = math.gcd(_hopper_tiles(problem).keys, problem.block_size)
    return copied if copied >= 8 else 0


def _padded_width(problem: Problem) -> int:
    """Columns of the wider rows in the shared memory of `attention_hopper`."""
    return columns_of(max(problem.head_dim, problem.value_dim))


def _hopper_tiles(problem: Problem) -> Tiles:
    """Tiles of `attention_hopper`: warpgroups of 64 rows, several buffers each for keys and for values."""
    width = _padded_width(problem)
    if _short_units(problem):
        return Tiles(64, 64, 4, 3, 3 if width == 64 else 2)
    if _in_three_parts(problem):
        return Tiles(192, 128, 12, 3, 1)
    return Tiles(128, 64 if width > 128 else 128, 8, {64: 4, 128: 3, 256: 2}[width], 1)


def _short_units(problem: Problem) -> bool:
    """Whether `attention_hopper` has several small programs on a multiprocessor: one computes while others wait.

    They read keys for half as many rows. The L2 cache serves that of short windows, and of narrow heads where many
    programs read the same keys at a time, unless rows are no multiples of its sectors.
    """
    width = _padded_width(problem)
    whole_sectors = problem.head_dim % 16 == problem.value_dim % 16 == 0
    many = problem.num_tokens >= SHARED * problem.num_seqs and not (problem.ragged or problem.features.window)
    prompts = width == 64 and whole_sectors and many and not _long_prompts(problem)
    return width <= 128 and (problem.short_window or prompts)


def _in_three_parts(problem: Problem) -> bool:
    """Whether many keys take as long to weight as to multiply: a third part has products for the tensor cores then.

    Its loaders have few registers: copies of 8 keys, and sizes that are no powers of two, make them spill. The third
    part is worth the few that columns of values between 32 and 64 make it spill.
    """
    narrow, block = _padded_width(problem) == 64, problem.block_size
    cheap = block % 128 == 0 or (block >= 16 and paging(block, 128) != "any")
    return narrow and cheap and _long_prompts(problem)


def _long_prompts(problem: Problem) -> bool:
    """Whether shapes tell that units have many tiles of keys."""
    return problem.num_tokens >= LONG * problem.num_seqs and not problem.features.window


def rounds(problem: Problem, programs: int) -> int:
    """How many times each of the programs of `attention_hopper` gets a piece, so that all stand in few heads at a time.

    Pieces end between units in all rounds but one: three units are left to a piece, or one where the L2 cache cannot
    hold even the keys of the new tokens. There is one round where few programs would read the same keys, or that cache
    holds these anyway.
    """
    heads, columns = problem.num_kv_heads, problem.head_dim + problem.value_dim
    close = problem.num_tokens * heads * columns * problem.itemsize <= KEPT_CLOSE
    if problem.short_window:
        once = close
    else:
        few = problem.num_tokens < SHARED * problem.num_seqs and not problem.ragged
        once = few and max(problem.head_dim, problem.value_dim) <= 128
    units = problem.num_tokens * (problem.num_heads // heads) // _hopper_tiles(problem).rows * heads
    return 1 if once else max(1, min(units // programs // (3 if close else 1), MOST_ROUNDS))


def unit_cost(tiles: Tiles, rows: int, copied: int) -> int:
    """What a unit of sequences of `rows` rows costs beside its keys, in tiles of keys."""
    if copied:
        return 3 if (tiles.rows, tiles.keys) == (128, 128) else 6
    return 4 if rows > FEW_ROWS else 2


def unmasked_first(problem: Problem, device: Device, tiles: Tiles, rows: int) -> bool:
    """Whether tiles that every row sees have a loop without masks.

    Always for many rows; for few, on Hopper, unless options need the registers.
    """
    features = problem.features
    costs_registers = features.window or features.alibi or "token" in (features.key.scale, features.value.scale)
    return rows > FEW_ROWS or (tiles.rows == FEW_ROWS and device.hopper and not costs_registers)


def hopper_registers(tiles: Tiles) -> int:
    """Registers of a thread of `attention_hopper`, before its warps, with four for the loaders, trade theirs."""
    return 65536 // (32 * (tiles.num_warps + 4) * tiles.resident) // 8 * 8


def max_registers(problem: Problem, device: Device, tiles: Tiles) -> int | None:
    """Registers of a thread, where telling the assembler was seen to spare it a spill; elsewhere it caused some."""
    if device.amd:
        return None
    if problem.itemsize == 4:
        width = max(problem.head_dim, problem.value_dim)
        if device.capability < 90:
            return 128 if tiles.rows == 32 and not 96 < width <= 128 else None
        if tiles.rows == 16 and width > 128:
            return 255
        by_key = device.hopper and paging(problem.block_size, tiles.keys) == "any"
        return 128 if tiles.rows == 16 and 64 < width <= 96 and by_key else None
    if tiles.num_warps > 4:
        return None
    return min(65536 // (32 * tiles.num_warps * tiles.resident) // 8 * 8, 255)


def narrowest_piece(problem: Problem, device: Device, tiles: Tiles) -> int:
    """Columns that a piece of a row has at least.

    Where values pass through registers on their way to Hopper's wgmma, NVIDIA's assembler (12.8) was seen to compute
    the addresses of pieces of 32 columns before it knows where they begin.
    """
    through_registers = not (problem.plain_caches and problem.aligned)
    return 64 if device.hopper and tiles.rows >= 64 and through_registers else 16


def shares_tiles(problem: Problem, narrowest: int) -> bool:
    """Whether a tile of keys, as it was loaded, holds the values too."""
    first_of_key, first_of_value = (split_dim(dim, narrowest)[0] for dim in (problem.head_dim, problem.value_dim))
    return problem.shared_values and first_of_key == first_of_value


def loads_pairs(problem: Problem, tiles: Tiles) -> bool:
    """Whether stored values come in pairs: tensor cores take them across rows, which bytes could do one by one only."""
    dim = problem.value_dim
    halves = dim >= 32 and dim & (dim - 1) == 0
    narrow = problem.value_itemsize == 1 and problem.itemsize == 2
    return narrow and halves and problem.aligned and tiles.rows <= 16 and not problem.shared_values


def paging(block_size: int, tile: int) -> str:
    """How the keys of a tile are found: in "one" block, in "several" whole ones, or key by key ("any")."""
    if block_size & (block_size - 1) or block_size == 1:
        return "any"
    return "one" if block_size >= tile else "several"


def _largest_tiles(problem: Problem, device: Device, rows: int) -> Tiles:
    """The largest tiles that were seen to compile without spilling registers."""
    width = max(problem.head_dim, problem.value_dim)
    many = rows > FEW_ROWS
    if problem.itemsize == 4:
        small = width <= 128 and problem.plain_caches
        many = many and width <= 256 and problem.plain_caches
        found = paging(problem.block_size, 32)
        warps = 8 if not small or many else 4
        # With other numbers, NVIDIA's assemblers spill a register or two.
        if small and not device.amd and (device.capability <= 90 or width > 96):
            warps = 8 if found == ("several" if many else "any") else 4
        return Tiles(32 if many else 16, 32 if small else 16, warps, 2 if many else 3, 8 // warps)
    keys = 128 if width <= 64 else 64 if width <= 128 else 32
    if rows <= 16:
        if _many_small(problem, device, width):
            int8 = "int8" in (problem.features.key.dtype, problem.features.value.dtype)
            return Tiles(16, 32, 2, 4, 6) if int8 else Tiles(16, keys, 2, 3, 4)
        return Tiles(16, keys if width <= 256 else 16, 4, 3, 2)
    # Hopper would hold query rows in registers where these are brought into float16's range.
    if width > 256 or (width > 128 and device.hopper and not problem.plain_caches):
        return Tiles(32, 16, 8, 3, 1)
    if many:
        # Only Hopper keeps the operands of its products out of registers and the results in as few as it can.
        fewer = not device.hopper or (width > 128 and paging(problem.block_size, keys) == "any")
        # Before Hopper, numbers are widened in registers.
        fewer_rows = width > 128 or (device.capability < 90 and not problem.plain_caches)
        rows = FEW_ROWS if not device.hopper and fewer_rows else MANY_ROWS
        # Of a window little is seen at a time, and its masks take registers.
        keys = min(keys, 64) if fewer or problem.features.window else keys
        # One register of 255 too few, with 64 keys.
        if device.capability < 90 and width <= 64 and problem.ragged and paging(problem.block_size, keys) == "one":
            keys = 32
        return Tiles(rows, keys, 8, 2 if fewer else 3, 1)
    # These wait for memory, so a third buffer comes first; Hopper has room for it and for larger tiles.
    large = device.hopper and (width <= 128 or (problem.aligned and not problem.features.alibi))
    keys = 64 if large else 32
    return Tiles(FEW_ROWS, keys, 4, 3, 2) if width <= 128 else Tiles(FEW_ROWS, keys, 8, 3, 1)


def _many_small(problem: Problem, device: Device, width: int) -> bool:
    """Whether decode has more, smaller programs: widening 8-bit numbers, they wait for each other less.

    Measured on an H200, whose memory is fast enough for it to matter; an H100 loses up to 3%. Of few units, cut into as
    many pieces as there are programs, the parts take longer to combine.
    """
    stored = not problem.plain_caches and 64 < width <= 128
    return device.hopper and stored and problem.num_seqs * problem.num_kv_heads >= MANY_UNITS


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
    narrowest = narrowest_piece(problem, device, tiles)
    keys, values = sum(split_dim(problem.head_dim, narrowest)), sum(split_dim(problem.value_dim, narrowest))
    row = keys * problem.key_itemsize + (0 if shares_tiles(problem, narrowest) else values * problem.value_itemsize)
    # From Hopper on, products of many rows read keys and values from shared memory while the next tile is loaded.
    from_shared = tiles.rows >= 64 and device.capability >= 90 and not device.amd
    buffers = max(tiles.num_stages - 1 + from_shared, 1)
    # Hopper's take weights from registers; with 8-bit caches, the same room serves tiles that are widened.
    weights = 0 if from_shared and device.hopper and problem.plain_caches else tiles.keys
    return buffers * tiles.keys * row + tiles.rows * (keys + weights) * problem.itemsize + 1024
