"""Products of the tensor cores in `attention_hopper`: of no columns but those that the loaders copied.

A row has one or two pieces of columns, each a power of two (`key_widths`, `value_widths`). Two of keys add to the same
scores; two of values have a sum each.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

PART_ROWS: gl.constexpr = gl.constexpr(64)  # of a warpgroup


@gluon.jit
def _zeros(WIDTH: gl.constexpr):
    """What products of a warpgroup's rows and `WIDTH` columns are added to."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    return gl.zeros([PART_ROWS, WIDTH], gl.float32, LAYOUT)


@gluon.jit
def add_keys(query, keys, count, V: gl.constexpr):
    """Starts the products of the query rows and the keys of tile number `count`; returns their scores to be."""
    FIRST: gl.constexpr = V.key_widths[0]
    REST: gl.constexpr = V.key_widths[1]
    transposed = keys.index(count % V.num_stages).permute((1, 0))
    rows, columns = query.slice(0, FIRST, 1), transposed.slice(0, FIRST, 0)
    scores = warpgroup_mma(rows, columns, _zeros(V.tile), use_acc=False, is_async=True)
    if REST > 0:
        rows, columns = query.slice(FIRST, REST, 1), transposed.slice(FIRST, REST, 0)
        scores = warpgroup_mma(rows, columns, scores, is_async=True)
    return scores


@gluon.jit
def no_output(V: gl.constexpr):
    """Sums of no values, one for each piece of columns."""
    outputs = ()
    for i in gl.static_range(1 + (V.value_widths[1] > 0)):
        outputs += (_zeros(V.value_widths[i]),)  # type: ignore[assignment]
    return outputs


@gluon.jit
def add_values(outputs, weights, values, count, V: gl.constexpr):
    """Starts adding the values of tile number `count`, each with its weight."""
    added = ()
    tile = values.index(count % V.num_stages)
    for i in gl.static_range(len(outputs)):
        columns = tile.slice(i * V.value_widths[0], V.value_widths[i], 1)
        alike = gl.convert_layout(weights, gl.DotOperandLayout(0, outputs[i].type.layout, 2), assert_trivial=True)
        added += (warpgroup_mma(alike, columns, outputs[i], is_async=True),)  # type: ignore[assignment]
    return added


@gluon.jit
def await_products(outputs, weights):
    """Waits for all of them; the weights are read until then."""
    read = outputs
    read += (weights,)
    found = warpgroup_mma_wait(0, deps=read)
    return found[:-1], found[-1]


@gluon.jit
def of_rows(numbers, LAYOUT: gl.constexpr):
    """`numbers` of rows, whose threads have them already, in the layout of a slice."""
    return gl.convert_layout(numbers, LAYOUT, assert_trivial=True)


@gluon.jit
def scaled(outputs, factor):
    """Rows of `outputs`, each times its factor."""
    found = ()
    for i in gl.static_range(len(outputs)):
        found += (outputs[i] * of_rows(factor, gl.SliceLayout(1, outputs[i].type.layout))[:, None],)
    return found
