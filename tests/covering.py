"""Few rows that try every pair of values of two factors: most bugs need no more than two options to show."""

import random
from itertools import combinations


def covering_rows(factors, allowed):
    """Rows {factor: value} in which every two values that may stand together do so at least once.

    `factors` are lists of hashable values; `allowed(row)` judges rows that may still lack factors. Greedy, so always
    the same rows: a row starts from the first pair that is missing, and takes values that bring the most others;
    equals are drawn from.
    """
    names = list(factors)
    missing = {
        (a, x, b, y): None
        for a, b in combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
        if allowed({a: x, b: y})
    }
    rows, draw = [], random.Random(0)
    while missing:
        a, x, b, y = next(iter(missing))
        row = {a: x, b: y}
        for name in names:
            if name not in row:
                choices = [value for value in factors[name] if allowed({**row, name: value})]
                draw.shuffle(choices)
                row[name] = max(
                    choices,
                    key=lambda value, row=row, name=name: len(pairs({**row, name: value}, names) & missing.keys()),
                )
        for pair in pairs(row, names):
            missing.pop(pair, None)
        rows.append(row)
    return rows


def pairs(row, names):
    """The pairs (factor, value, factor, value) of a row, in the order of the factors."""
    present = [name for name in names if name in row]
    return {(a, row[a], b, row[b]) for a, b in combinations(present, 2)}
