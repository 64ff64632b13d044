"""Twenty kills; ``python -m tests.recipes.kills 200`` makes more of them."""

from pathlib import Path

import pytest

from .kills import Chain


@pytest.mark.sweep(in_every_part=True)
@pytest.mark.parametrize(("sizes", "count"), [((1, 2), 7), ((2, 1), 7), ((2, 2), 6)])
def test_killed_runs_end_as_if_undisturbed(folder: Path, sizes: tuple[int, int], count: int) -> None:
    seed, done = 0, 0
    while done < count:
        done += len(list(Chain(folder, sizes, seed).kills(count - done)))
        seed += 1
