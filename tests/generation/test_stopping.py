from __future__ import annotations

import pytest

from fabric_tp.generation.stopping import Continuation, Stopping


def given_out(stop: list[list[int]], tokens: list[int], include: bool) -> list[list[int]]:
    """What is new and certain after each token, until it stops."""
    continuation, given = Continuation(Stopping(stop, include)), []
    for number, token in enumerate(tokens):
        given.append(continuation.add(token, last=number == len(tokens) - 1))
        if continuation.stopped:
            break
    return given


@pytest.mark.parametrize(
    ("stop", "tokens", "included", "excluded"),
    [
        ([], [1, 2], [[1], [2]], [[1], [2]]),
        ([[2]], [1, 2, 3], [[1], [2]], [[1], []]),
        ([[2, 3]], [1, 2, 3, 4], [[1], [2], [3]], [[1], [], []]),
        ([[2, 3]], [2, 2, 3, 4], [[2], [2], [3]], [[], [2], []]),  # the second is the beginning
        ([[2, 3]], [2, 4, 5], [[2], [4], [5]], [[], [2, 4], [5]]),  # none came of it
        ([[2, 3]], [1, 2], [[1], [2]], [[1], [2]]),  # nor will any
        ([[2, 3, 4], [3]], [2, 3, 4], [[2], [3]], [[], [2]]),  # the shorter one within the longer one
        ([[1, 2], [2]], [1, 2], [[1], [2]], [[], []]),  # both at once
    ],
)
def test_what_is_given_out(stop, tokens, included, excluded) -> None:
    assert given_out(stop, tokens, include=True) == included
    assert given_out(stop, tokens, include=False) == excluded
