"""How the loader of keys of `attention_hopper` tells the other warps of a program of its units, one after another.

    told      | unit 4 | unit 1 | unit 2 | unit 3 |      unit 0 is forgotten by all, as unit 4 stands in its place

What is told of a unit stands in a ring in shared memory, for all to read when they need it:

    0     1      2     3       4       5     6      7    8         9     10
    head  token  rows  offset  behind  keys  first  end  sequence  unit  part
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

RING: gl.constexpr = gl.constexpr(4)  # units
RECORD: gl.constexpr = gl.constexpr(32)  # numbers that a unit may have there, one for each thread of a warp


@gluon.jit
def tell(ring, number, record):
    """Tells of unit number `number` of this program, once there is room; a head of -1 says that there are no more."""
    records, free, here = ring
    place, phase = number % RING, number // RING & 1
    mbarrier.wait(free.index(place), phase ^ 1)
    numbers = gl.full([RECORD], 0, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    # `gl.arange`, read where it is used, as it costs the loaders a register otherwise.
    field = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [numbers], gl.int32, is_pure=False, pack=1)
    for told in gl.static_range(len(record)):
        numbers = gl.where(field == told, record[told], numbers)
    records.index(place).store(numbers)
    mbarrier.arrive(here.index(place), count=1)


@gluon.jit
def hear(ring, number):
    """Waits until it was told of unit number `number`."""
    _, _, here = ring
    mbarrier.wait(here.index(number % RING), number // RING & 1)


@gluon.jit
def forget(ring, number):
    """Lets the place of unit number `number` be used again, as far as this part of the warps is concerned."""
    _, free, _ = ring
    mbarrier.arrive(free.index(number % RING), count=1)


@gluon.jit
def _recall(ring, number, FROM: gl.constexpr, TO: gl.constexpr):
    """The numbers [FROM, TO) that were told of a unit. Read where they are used, they cost no registers elsewhere."""
    records, _, _ = ring
    LAYOUT: gl.constexpr = gl.BlockedLayout([RECORD], [32], [gl.num_warps()], [0])
    numbers = records.index(number % RING).load(LAYOUT)
    field = gl.arange(0, RECORD, LAYOUT)
    record = ()
    for wanted in gl.static_range(FROM, TO):
        record += (gl.sum(gl.where(field == wanted, numbers, 0), 0),)  # type: ignore[assignment]
    return record


@gluon.jit
def rows_of_unit(ring, number):
    """Head, first query token, rows, and how many rows of that token stand before them (`offset`)."""
    return _recall(ring, number, 0, 4)


@gluon.jit
def keys_of_unit(ring, number):
    """Offset, `behind`, keys of the sequence, first tile and end.

    `behind` is the first query token less the number of queries: with 0 queries, it sees what the token does.
    """
    return _recall(ring, number, 3, 8)


@gluon.jit
def source_of_unit(ring, number):
    """`behind` (see `keys_of_unit`), keys of the sequence, first tile and end, sequence."""
    return _recall(ring, number, 4, 9)


@gluon.jit
def left_of_unit(ring, number):
    """Sequence, unit, and which part of it is here: -1 all, 0 the first, 1 one between others, 2 the last."""
    return _recall(ring, number, 8, 11)
