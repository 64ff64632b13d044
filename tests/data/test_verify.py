"""What counts as the same batch, and what ranks say that have different ones."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from fabric_tp.data.verify import fingerprint
from tests.data.fabric import Mean, gather, on_ranks


@dataclass
class Sample:
    tokens: object


ONES = torch.ones(2, 3)
BATCHES = {
    "number": (1, 2),
    "type of number": (1, True),
    "string": ("a", "b"),
    "None": (None, 0),
    "dtype": (ONES, ONES.double()),
    "shape": (ONES, ONES.view(3, 2)),
    "content": (ONES, ONES + 1),
    "bfloat16": (ONES.bfloat16(), ONES.bfloat16() * 2),
    "bool": (ONES.bool(), ~ONES.bool()),
    "0-d": (torch.tensor(1), torch.tensor(2)),
    "empty": (torch.empty(0, 2), torch.empty(0, 3)),
    "array": (np.ones(3), np.zeros(3)),
    "strides": (ONES.T, ONES.view(3, 2) + 1),
    "length": ([ONES], [ONES, ONES]),
    "key": ({"a": ONES}, {"b": ONES}),
    "value": ({"a": [ONES]}, {"a": [ONES + 1]}),
    "mapping": (UserDict(a=1), UserDict(a=2)),
    "dataclass": (Sample(ONES), Sample(ONES + 1)),
}


@pytest.mark.parametrize(("one", "other"), BATCHES.values(), ids=BATCHES)
def test_different_batches_have_different_fingerprints(one, other) -> None:
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(("one", "other"), BATCHES.values(), ids=BATCHES)
def test_a_batch_has_one_fingerprint(one, other) -> None:
    assert fingerprint(one) == fingerprint(one)


def test_memory_layout_does_not_count() -> None:
    assert fingerprint(ONES.T) == fingerprint(ONES.T.contiguous())


def batches_by_hand(differ_at: int, every: int) -> list[tuple[int, str]]:
    """How many forwards each rank came to, and its error."""
    with on_ranks((1, 2), verify_inputs=every) as fabric:
        model = fabric.setup(Mean())
        step, error = 0, ""
        try:
            for step in range(7):
                model(torch.full((2,), float(dist.get_rank()) if step == differ_at else 5.0))
        except ValueError as exception:
            error = str(exception)
        return gather((step, error))


@pytest.mark.parametrize(("differ_at", "every", "stops_at"), [(0, 3, 0), (3, 3, 3), (4, 1, 4), (4, 3, 6)])
def test_inputs_made_by_hand_are_compared(pool, differ_at, every, stops_at) -> None:
    for step, error in pool(2)(batches_by_hand, differ_at, every):
        assert step == stops_at
        assert ("the model's inputs" in error) == (differ_at == stops_at)


def nested(differ: bool) -> list[str]:
    rank = dist.get_rank() if differ else 0
    data = [{"tokens": torch.ones(3), "lengths": [1, 2 + (i == 4) * rank]} for i in range(6)]
    with on_ranks((1, 2), verify_inputs=2) as fabric:
        model = fabric.setup(Mean())
        error = ""
        try:
            for batch in fabric.setup_dataloaders(DataLoader(data, batch_size=None)):  # type: ignore[arg-type]
                model(batch["tokens"])
        except ValueError as exception:
            error = str(exception)
        return gather(error)


def test_error_names_batch_key_and_ranks(pool) -> None:
    first, second = pool(2)(nested, True)
    assert first == second
    assert "batch 4 of epoch 0 of dataloader 0: at ['lengths'][1] there is 2 on ranks [0], 3 on ranks [1]" in first


def test_equal_batches_pass(pool) -> None:
    assert pool(2)(nested, False) == ["", ""]


def look_in_the_middle(really_differ: bool) -> list[str]:
    """The first rank looks at a new pass of the same dataloader, and at a batch of another, in every step."""
    with on_ranks((1, 2), verify_inputs=1) as fabric:
        model = fabric.setup(Mean())
        loader, other = fabric.setup_dataloaders(DataLoader(torch.arange(8)), DataLoader(torch.arange(8)))  # type: ignore[arg-type]
        error, epochs = "", []
        try:
            for _ in range(3):
                batches = iter(loader)
                for batch in batches:
                    if dist.get_rank() == 0:
                        next(iter(loader)), next(iter(other))
                        batch = next(batches) if really_differ and int(batch) == 3 else batch
                    model(batch)
                epochs.append(loader._dataloader._last_pass.epoch)
            assert epochs == [0, 1, 2]
        except ValueError as exception:
            error = str(exception)
        return gather(error)


def test_a_rank_may_look_at_batches_that_others_do_not(pool) -> None:
    assert pool(2)(look_in_the_middle, False) == ["", ""]


def test_a_rank_that_takes_a_batch_more_is_noticed(pool) -> None:
    for error in pool(2)(look_in_the_middle, True):
        assert "rank 0" in error
        assert "batch 3 of epoch 0 of dataloader 0" in error
        assert "on rank 1" in error


def seeded_differently() -> list[str]:
    with on_ranks((1, 2)) as fabric:
        fabric.seed_everything(7 + dist.get_rank(), verbose=False)
        try:
            fabric.setup(Mean())
        except ValueError as error:
            return gather(str(error))
        return gather("")


def test_seeds_by_rank_are_refused_with_the_model(pool) -> None:
    assert all("['7', '8'] by rank" in error for error in pool(2)(seeded_differently))


def unsharded(sharded: bool) -> list[int]:
    import warnings

    with on_ranks((2, 1), verify_inputs=1) as fabric, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fabric.setup(Mean())
        start = dist.get_rank() if sharded else 0
        loader = fabric.setup_dataloaders(DataLoader(torch.arange(start, start + 8)), use_distributed_sampler=False)  # type: ignore[arg-type]
        for batch in loader:
            model(batch)
        return gather(sum("very same first batch" in str(each.message) for each in caught))


@pytest.mark.parametrize("sharded", [True, False])
def test_data_parallel_ranks_with_the_same_data_are_warned_once(pool, sharded) -> None:
    assert pool(2)(unsharded, sharded)[0] == int(not sharded)
