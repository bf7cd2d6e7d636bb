"""What attention is launched for: shapes, layout, dtypes and the device, without any length."""

from dataclasses import dataclass

from torch_paged.kernels.features import PLAIN_FEATURES, Features


def next_power_of_two(number: int) -> int:
    """Smallest power of two that is at least `number` (>= 1)."""
    return 1 << (number - 1).bit_length()


# Called while a kernel is compiled, where Triton allows no call of another Python function.
def columns_of(dim: int) -> int:
    """Columns that rows of `dim` numbers have in the shared memory of `attention_hopper`, padded with zeros."""
    return max(1 << (dim - 1).bit_length(), 64)


def split_dim(dim: int, narrowest: int = 16, second: int = 32) -> tuple[int, int]:
    """Widths of the one or two power-of-two pieces that cover `dim` (>= 16) columns; the second may be 0.

    96 is 64 + 32 and 576 is 512 + 64: no tile is padded to 128 or 1024. 112 is 128, as 64 + 64 would save nothing.
    The second has `second` columns or more: 32, as of 16 the compiler would repeat a product of 16 rows in every warp.
    `attention_hopper` has no such products.
    """
    wide = 1 << (max(dim, narrowest).bit_length() - 1)
    if wide >= dim:
        return wide, 0
    rest = max(next_power_of_two(dim - wide), second, narrowest)
    return (2 * wide, 0) if wide + rest >= 2 * wide else (wide, rest)


@dataclass(frozen=True)
class Device:
    """What a launch needs to know of a device."""

    multiprocessors: int
    shared_memory: int  # bytes of one multiprocessor that thread blocks can use
    capability: int = 90  # 10 * major + minor
    amd: bool = False

    @property
    def hopper(self) -> bool:
        """Whether it is one of NVIDIA's Hopper generation."""
        return self.capability == 90 and not self.amd


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
    copyable: bool = True  # the copy engine of Hopper can address every row of the caches
    short_window: bool = False  # no longer than `launch_tiles.SHORT_WINDOW`

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
