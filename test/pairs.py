"""Owns combinations of parameters: few of all, in which each value meets each value of each other parameter."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def pairs(*parameters: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Values for pytest's parametrize, one of each parameter; what only three together show needs a test of its own.

    Always those that bring the most pairs that were not there yet, and of such the first: the same in every process.
    """
    all_values = [list(values) for values in parameters]
    left = list(product(*(range(len(values)) for values in all_values)))
    missing = {pair for chosen in left for pair in combinations(enumerate(chosen), 2)}
    taken = []
    while missing:
        best = max(left, key=lambda chosen: sum(pair in missing for pair in combinations(enumerate(chosen), 2)))
        missing.difference_update(combinations(enumerate(best), 2))
        taken.append(best)
    return [tuple(values[at] for values, at in zip(all_values, chosen, strict=True)) for chosen in sorted(taken)]
