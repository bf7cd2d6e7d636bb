"""Joins two attentions over disjoint keys into the attention over all of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_paged.kernels.launch import Launcher, Plans, addresses, layout
from torch_paged.kernels.vectors import (
    effective_strides,
    strides_in_vectors,
    tile_vectors,
    vector_offsets,
    vector_width,
)

_VECTORS = 256  # computed by one program: two per thread


@triton.jit
def _load_part(output, lse, output_strides, lse_strides, token, head, dim, mask, VECTOR: tl.constexpr):
    """One tile of a part, in float32, and its rows' lse."""
    lse = tl.load(lse + token * lse_strides[0] + head * lse_strides[1], mask=mask, other=float("-inf"))
    # A part that saw no key has no say, whatever its rows hold.
    seen = mask & (lse != float("-inf"))
    # [VECTORS, VECTOR]
    offsets = vector_offsets(token * output_strides[0] + head * output_strides[1], dim, output_strides[2], VECTOR)
    return tl.load(output + offsets, mask=seen[:, None], other=0.0).to(tl.float32), lse


_STRIDES = [f"{of}_{part}_stride{i}" for part in "ab" for of, n in (("output", 3), ("lse", 2)) for i in range(n)]


@triton.jit(do_not_specialize=[*_STRIDES, "num_tokens"])
def _merge_attention(
    output_a, lse_a, output_b, lse_b, output, lse,
    output_a_stride0, output_a_stride1, output_a_stride2, lse_a_stride0, lse_a_stride1,
    output_b_stride0, output_b_stride1, output_b_stride2, lse_b_stride0, lse_b_stride1,
    num_tokens,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """
    lse = log(exp(lse_a) + exp(lse_b))      output = exp(lse_a - lse) * output_a + exp(lse_b - lse) * output_b

    grid: tiles of VECTORS vectors over [num_tokens, NUM_HEADS, HEAD_DIM]
    """
    token, head, dim = tile_vectors(NUM_HEADS, HEAD_DIM, VECTOR, VECTORS)
    row = token * NUM_HEADS + head
    mask = token < num_tokens
    tile_a, part_a = _load_part(
        output_a, lse_a, (output_a_stride0, output_a_stride1, output_a_stride2), (lse_a_stride0, lse_a_stride1),
        token, head, dim, mask, VECTOR,
    )  # fmt: skip
    tile_b, part_b = _load_part(
        output_b, lse_b, (output_b_stride0, output_b_stride1, output_b_stride2), (lse_b_stride0, lse_b_stride1),
        token, head, dim, mask, VECTOR,
    )  # fmt: skip
    largest = tl.maximum(part_a, part_b)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weight_a, weight_b = tl.exp(part_a - shift), tl.exp(part_b - shift)
    total = weight_a + weight_b
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    # [VECTORS, VECTOR]
    tile = tile_a * (weight_a / total)[:, None] + tile_b * (weight_b / total)[:, None]
    offsets = vector_offsets(row * (HEAD_DIM // VECTOR), dim, 1, VECTOR)
    tl.store(output + offsets, tile.to(output.dtype.element_ty), mask=mask[:, None])
    merged = tl.where(empty, float("-inf"), shift + tl.log(total))
    tl.store(lse + row, merged, mask=mask & (dim == 0))


def merge_attention(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted mean of two attention outputs, computed in float32; any strides.

    Args:
        output_a, output_b: `[num_tokens, num_heads, value_head_dim]`, any floating dtypes.
        lse_a, lse_b: float32 `[num_tokens, num_heads]`.

    Returns:
        output, contiguous, of output_a's dtype, and lse float32 `[num_tokens, num_heads]`; zeros and -inf where
        both parts saw no key.
    """
    output = output_a.new_empty(output_a.shape)
    lse = output_a.new_empty(output_a.shape[:2], dtype=torch.float32)
    if output.numel() == 0:
        return output, torch.logaddexp(lse_a, lse_b, out=lse)  # rows without elements still have an lse
    parts = (output_a, lse_a, output_b, lse_b)
    metadata = output_a.device, *map(layout, parts)
    launcher, numbers = _plans.get(metadata) or _plans.remember(metadata, _plan(parts))
    tensors = *parts, output, lse
    launcher(*(addresses(tensors) if launcher.ready else tensors), *numbers)
    return output, lse


_plans: Plans[tuple[Launcher, list[int]]] = Plans()


def _plan(parts: tuple[Tensor, ...]) -> tuple[Launcher, list[int]]:
    """The launch for both parts, and the numbers among its arguments."""
    output_a, _, output_b, _ = parts
    num_tokens, num_heads, head_dim = output_a.shape
    strides = [effective_strides(part) for part in parts]
    vector = _vector(parts, strides)
    constants = dict(NUM_HEADS=num_heads, HEAD_DIM=head_dim, VECTOR=vector, VECTORS=_VECTORS)
    numbers = [
        *strides_in_vectors(output_a, vector),
        *strides[1],
        *strides_in_vectors(output_b, vector),
        *strides[3],
        num_tokens,
    ]
    grid = (triton.cdiv(output_a.numel() // vector, _VECTORS), 1, 1)
    return Launcher(_merge_attention, grid, constants, dict(num_warps=4)), numbers


def _vector(parts: tuple[Tensor, ...], strides: list[tuple[int, ...]]) -> int:
    """Elements that are contiguous and aligned alike in both outputs."""
    *rest_a, last_a = strides[0]
    *rest_b, last_b = strides[2]
    if last_a != 1 or last_b != 1:
        return 1
    itemsize = min(parts[0].element_size(), parts[2].element_size())
    return vector_width(itemsize, [parts[0].shape[2], *rest_a, *rest_b])
