"""Units that are alike: whole, or in equal parts, in turn."""

import itertools
import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")
from dealt_pieces import check_covered, deal, dealt_pieces, dealt_rounds, variant_of
from dealt_units import units_of

from torch_paged.kernels.piece_list import PIECES_BEGIN

pytestmark = [pytest.mark.interpreter if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu]


@pytest.mark.parametrize(
    ("queries", "keys", "programs", "rounds", "parts"),
    [
        ([90], [4000], 13, 1, 1),  # 3 tiles of rows of 4 heads
        ([90, 0, 96], [4000, 50, 3900], 13, 1, 1),
        ([90, 0, 96], [4000, 50, 3900], 12, 3, 1),
        ([96] * 20, [4000] * 20, 32, 1, 1),
        ([20] * 132, [4000] * 132, 66, 2, 1),
        ([32], [4000], 13, 1, 3),
        ([32], [4000], 12, 2, 3),
        ([1, 20, 1], [400, 4000, 9], 33, 1, 8),
        ([60] * 40, [200] * 40, 21, 1, 1),
    ],
    ids=["one", "two", "empty-round", "many", "sequences", "thirds", "empty-thirds", "decodes-beside", "short"],
)
def test_alike_units_are_cut_alike(queries, keys, programs, rounds, parts):
    """Long ones go one after the other to all programs, and what the rounds do not hold is in the list."""
    heads = 4
    v = variant_of(queries, keys, 0, heads, programs, num_heads=16)
    v = replace(v, rows_above=16)
    dealt, late = dealt_rounds(queries, keys, 0, heads, programs, rounds, v)
    pieces = [*itertools.chain(*dealt)]
    whole = check_covered(pieces, late, queries, keys, 0, heads, v)
    tiles = dict(units_of([*queries, 0], [*keys, 0], heads, v))
    assert not late
    if keys[0] > 200:
        assert all(count <= 1 for *_, count, _ in pieces)
        assert len(pieces) == max(len(tiles) * parts, programs * rounds)
    if parts == 1:
        assert all(whole)
    for sequence, unit, first, count, end in pieces:
        of_unit = tiles.get((sequence, unit), 0)
        assert count == 0 or min(end, of_unit) - first <= -(-of_unit // parts)


@pytest.mark.parametrize(
    ("queries", "keys", "programs", "rounds"),
    [
        ([90, 20], [4000, 400], 15, 1),
        ([96] * 8, [3600] * 6 + [5200] * 2, 12, 1),
        ([33], [4000], 13, 1),
        ([96] * 5, [4000] * 5, 11, 3),
        ([96] * 2, [1500] * 2, 12, 2),
    ],
    ids=["lengths", "longest", "too-few-for-all", "rounds-do-it-better", "short"],
)
def test_other_units_are_cut_where_pieces_end(queries, keys, programs, rounds):
    """12 units of 4000 keys and 4 of 400; 24 and 8; 8; 60, which are 5.5 turns; 24 that do not have many keys."""
    heads = 4
    v = replace(variant_of(queries, keys, 0, heads, programs, num_heads=16), rows_above=16)
    pieces, late = dealt_pieces(queries, keys, 0, heads, programs, rounds, v)
    assert not all(check_covered(pieces, late, queries, keys, 0, heads, v))
    assert all(count for *_, count, _ in pieces[-programs:])


@pytest.mark.parametrize(("window", "ragged"), [(1700, True), (None, False)])
def test_alike_units_of_a_window_or_a_uniform_batch_go_in_turn(window, ragged):
    queries, keys, heads, programs, rounds = [96] * 6, [4000] * 6, 4, 12, 2
    v = variant_of(queries, keys, 0, heads, programs, num_heads=16, window=window, ragged=ragged)
    dealt, late = dealt_rounds(queries, keys, 0, heads, programs, rounds, v, window=window)
    assert all(check_covered(itertools.chain(*dealt), late, queries, keys, 0, heads, v, window))
    assert [[count for *_, count, _ in turn] for turn in dealt] == [[1] * 12, [1] * 12, [1] * 48]


def test_a_program_does_not_get_the_longest_unit_of_every_turn():
    """11 programs, and heads of 11 units, which have 2000 to 3400 keys."""
    queries, keys, heads, programs, rounds = [1408], [3400], 6, 11, 6
    v = variant_of(queries, keys, 0, heads, programs, num_heads=heads)
    pieces, _, _ = deal(queries, keys, 0, heads, programs, rounds, v)
    tiles = dict(units_of([*queries, 0], [*keys, 0], heads, v))
    pieces = pieces[PIECES_BEGIN.value :][: 5 * programs * rounds].view(programs, rounds, 5).tolist()
    assert sorted(unit for turns in pieces for _, unit, *_ in turns) == [*range(66)]
    work = [sum(tiles[0, unit] for _, unit, *_ in turns) for turns in pieces]
    assert max(work) * programs <= 1.06 * sum(work)


def test_no_more_alike_units_are_listed_than_there_is_room_for():
    """Of sequences that overlap there may be more."""
    queries, keys, heads, programs = [90] * 9, [4000] * 9, 4, 10
    v = replace(variant_of(queries, keys, 0, heads, programs, num_heads=16), rows_above=16)
    dealt, late = dealt_rounds([90], keys, 0, heads, programs, 1, v, bounds=[0, 90] * 5)
    assert len(dealt) == 1 and not late
