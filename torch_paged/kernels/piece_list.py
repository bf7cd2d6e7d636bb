"""Where the pieces stand in memory that `deal_pieces` writes and the programs of `attention_hopper` read, int32.

    next, end | program 0, round 0 | round 1 | ... | program 1, round 0 | ... | listed | listed | ...
    0           2                    7                                          2 + 5 * programs * rounds

A piece: its first sequence, unit and tile, how many units, and the tile that is the end in the last of them. Those with
numbers [next, end) are listed: a program that has done with its own takes the next one. All others belong to a program.
"""

import triton
import triton.language as tl

from torch_paged.kernels.deal import PIECE

PIECES_BEGIN: tl.constexpr = tl.constexpr(2)


def num_piece_ints(programs: int, rounds: int, room: int) -> int:
    """int32 numbers that `deal_pieces` writes for so many rounds, with room for so many units in the list."""
    begin: int = PIECES_BEGIN.value
    piece: int = PIECE.value
    return begin + piece * (programs * rounds + room)


@triton.jit
def write_listed(pieces, begin, end):
    """Numbers of the listed ones."""
    tl.store(pieces, begin)
    tl.store(pieces + 1, end)
