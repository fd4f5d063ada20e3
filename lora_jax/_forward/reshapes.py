"""The parts that a reshape leaves to themselves."""

from collections.abc import Sequence


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Return pairs of old axes and the new axes that they become in a reshape: the finest such groups, without sizes of
    one.

    >>> reshape_groups((8, 1, 24), (8, 4, 6)), reshape_groups((8, 6), (6, 8))
    ([((0,), (0,)), ((2,), (1, 2))], [((0, 1), (0, 1))])
    """
    before = [k for k, size in enumerate(old) if size != 1]
    after = [k for k, size in enumerate(new) if size != 1]
    groups, i, j = [], 0, 0
    while i < len(before) and j < len(after):
        first_i, first_j, left, right = i, j, old[before[i]], new[after[j]]
        i, j = i + 1, j + 1
        while left != right:  # the smaller product takes in its next axis
            if left < right:
                left, i = left * old[before[i]], i + 1
            else:
                right, j = right * new[after[j]], j + 1
        groups.append((tuple(before[first_i:i]), tuple(after[first_j:j])))
    return groups if i == len(before) and j == len(after) else None
