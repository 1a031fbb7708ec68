"""Station 6: which rows of a cache are still to be read, and by which process.

Rows stand in the order of their length; a span is from its first row to the one behind its last.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

Span = tuple[int, int]


def find_gaps(done: Sequence[Span], rows: int) -> list[Span]:
    """What `done`, disjoint and in order, leaves of so many rows."""
    begins = [0, *(end for _, end in done)]
    ends = [*(start for start, _ in done), rows]
    return [(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]


def split_between_processes(gaps: Sequence[Span], lengths: Sequence[int], processes: int) -> list[list[Span]]:
    """What each process reads of the gaps: one after the other, with about as many tokens each.

    Args:
        gaps: spans of rows.
        lengths: tokens of each row, in the rows' order.
        processes: how many there are.
    """
    places = [place for start, end in gaps for place in range(start, end)]
    so_far = list(accumulate((lengths[place] for place in places), initial=0))
    cuts = [bisect_left(so_far, so_far[-1] * part / processes) for part in range(processes)] + [len(places)]
    return [_spans(places[start:end]) for start, end in pairwise(cuts)]


def _spans(places: Sequence[int]) -> list[Span]:
    found: list[Span] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found
