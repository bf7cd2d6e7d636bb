"""Vectors of elements: how wide they can be, and which row and columns each of them is."""

import math
from collections.abc import Iterable, Sequence

import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16


def vector_width(itemsize: int, numbers: Iterable[int]) -> int:
    """Elements of `itemsize` bytes in one access: 16 bytes, or less where a number is no multiple of that."""
    return math.gcd(max(VECTOR_BYTES // itemsize, 1), *numbers)


def effective_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of `tensor`, 0 along dimensions of size 1, where any stride is legal and none counts."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def common_vector(tensors: Sequence[Tensor], *numbers: int) -> int:
    """Elements that are contiguous and aligned alike in every one of `tensors`, and divide `numbers`."""
    strides = [effective_strides(tensor) for tensor in tensors]
    if any(last != 1 for *_, last in strides):
        return 1
    rows = [number for tensor, (*rest, _) in zip(tensors, strides, strict=True) for number in (*rest, tensor.shape[-1])]
    return vector_width(min(tensor.element_size() for tensor in tensors), [*rows, *numbers])


def dense(numbers: Tensor) -> Tensor:
    """`numbers` as kernels read ids and lengths, with a unit last stride: itself, unless it is some unusual view."""
    return numbers if numbers.dim() == 0 or numbers.shape[-1] <= 1 or numbers.stride(-1) == 1 else numbers.contiguous()


@triton.jit
def tile_vectors(HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr, VECTORS: tl.constexpr):
    """Row, head and first column, 64 bits each, of the VECTORS vectors of this program in [rows, HEADS, HEAD_DIM]."""
    HEAD_VECTORS: tl.constexpr = HEAD_DIM // VECTOR
    ROW_VECTORS: tl.constexpr = HEADS * HEAD_VECTORS
    # One 64-bit division for the whole tile: the lanes then divide 32-bit numbers.
    first = tl.program_id(0).to(tl.int64) * VECTORS
    vector = (first % ROW_VECTORS).to(tl.int32) + tl.arange(0, VECTORS)
    row = first // ROW_VECTORS + vector // ROW_VECTORS
    head = (vector % ROW_VECTORS // HEAD_VECTORS).to(tl.int64)
    dim = (vector % HEAD_VECTORS * VECTOR).to(tl.int64)
    return row, head, dim


def strides_in_vectors(tensor: Tensor, vector: int) -> list[int]:
    """Strides of `tensor` in vectors, but for the last one: a kernel that multiplies them knows what they divide by."""
    *rest, last = effective_strides(tensor)
    return [*(stride // vector for stride in rest), last]


@triton.jit
def vector_offsets(start, dim, stride, VECTOR: tl.constexpr):
    """[VECTORS, VECTOR] offsets of columns from `dim` on, `stride` apart (1 if VECTOR > 1); `start` is in vectors."""
    column = dim[:, None] + tl.arange(0, VECTOR)[None, :]
    if VECTOR == 1:
        column *= stride
    return (start * VECTOR)[:, None] + column
