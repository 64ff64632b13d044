"""Epochs and lengths that all ranks agree on, and what is left of the user's dataloader."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from tests.data.fabric import Mean, gather, on_ranks
from tests.data.stand_ins import ResumableDataLoader

NUMBERS = torch.arange(16)


def orders(looks: str, trains: bool) -> list[list[list[int]]]:
    """Of three passes, of which the first rank begins others in between."""
    with on_ranks((1, 2), verify_inputs=0) as fabric:
        model = fabric.setup(Mean())
        loader = fabric.setup_dataloaders(DataLoader(NUMBERS, batch_size=4, shuffle=True))  # type: ignore[arg-type]
        found = []
        for _ in range(3):
            if looks == "before" and dist.get_rank() == 0:
                next(iter(loader))
            found.append([])
            for batch in loader:
                if trains:
                    model(batch)
                if looks == "within" and dist.get_rank() == 0:
                    next(iter(loader))
                found[-1].extend(batch.tolist())
        return gather(found)


@pytest.mark.parametrize("looks", ["never", "before", "within"])
def test_epochs_follow_training_and_not_who_looks(pool, looks) -> None:
    first, second = pool(2)(orders, looks, True)
    assert first == second == pool(2)(orders, "never", True)[0]
    assert len({tuple(order) for order in first}) == 3


def test_without_training_the_epoch_is_the_same(pool) -> None:
    for found in pool(2)(orders, "never", False):
        assert found[0] == found[1] == found[2]


class Length(Sampler[int]):
    def __init__(self, length: int, promised: int) -> None:
        self.length, self.promised = length, promised

    def __len__(self) -> int:
        return self.promised

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


def lengths(sizes: tuple[int, int], by_rank: list[int], promised: list[int]) -> list[tuple[int, int, int, str]]:
    """The length, the batches of a pass, warnings, and an error of each rank."""
    with on_ranks(sizes) as fabric, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rank = dist.get_rank()
        dataloader = DataLoader(NUMBERS, sampler=Length(by_rank[rank], promised[rank]))  # type: ignore[arg-type]
        length = count = 0
        error = ""
        try:
            loader = fabric.setup_dataloaders(dataloader, use_distributed_sampler=False)
            length = len(loader)
            for _ in loader:
                count += 1
        except ValueError as exception:
            error = str(exception)
        said = sum("stop after" in str(each.message) for each in caught)
        return gather((length, count, said, error))


def test_data_parallel_ranks_stop_at_the_shortest_and_say_so_once(pool) -> None:
    first, second = pool(2)(lengths, (2, 1), [5, 3], [5, 3])
    assert first == (3, 3, 1, "")
    assert second == (3, 3, 0, "")


def test_ranks_of_a_group_must_have_one_length(pool) -> None:
    for length, _, _, error in pool(2)(lengths, (1, 2), [5, 3], [5, 3]):
        assert length == 0
        assert "[5, 3] batches on the ranks from 0 on" in error


def test_a_length_that_is_not_kept_is_named(pool) -> None:
    first, _ = pool(2)(lengths, (2, 1), [4, 3], [4, 4])
    assert first[1] == 4
    assert "after 3 of the 4 batches" in pool(2)(lengths, (2, 1), [4, 3], [4, 4])[1][3]


class Unsized(IterableDataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.size))


def unknown_lengths(by_rank: list[int]) -> list[list[int]]:
    with on_ranks((2, 2)) as fabric:
        loader = fabric.setup_dataloaders(DataLoader(Unsized(by_rank[dist.get_rank()]), batch_size=None))
        with pytest.raises(TypeError, match="not known"):
            len(loader)
        return gather([len(list(loader)) for _ in range(2)])


def test_unknown_lengths_end_together(pool) -> None:
    assert pool(4)(unknown_lengths, [6, 6, 4, 4]) == [[4, 4]] * 4


def looks_alone() -> list[str]:
    with on_ranks((1, 2)) as fabric:
        loader = fabric.setup_dataloaders(DataLoader(Unsized(4), batch_size=None))
        try:
            if dist.get_rank() == 0:
                next(iter(loader))
            list(loader)
        except ValueError as error:
            return gather(str(error))
        return gather("")


def test_looking_alone_into_an_unknown_length_is_named(pool) -> None:
    for error in pool(2)(looks_alone):
        assert "batch 0 of pass 1 on rank 0, batch 1 of pass 0 on rank 1" in error


def one_process() -> tuple[list[float], list[float]]:
    with on_ranks((1, 1)) as fabric:
        fabric.seed_everything(3, verbose=False)
        loader = fabric.setup_dataloaders(DataLoader(NUMBERS, shuffle=True, collate_fn=lambda batch: random.random()))  # type: ignore[arg-type]
        random.seed(0)
        passes = []
        for _ in range(2):
            passes.append([])
            for batch in loader:
                passes[-1].append(batch)
        assert random.random() == random.Random(0).random()
        return passes[0], passes[1]


def test_loading_neither_sees_nor_moves_the_programs_random_states(pool) -> None:
    first, second = pool(1)(one_process)
    assert first == second


def attributes() -> None:
    with on_ranks((1, 1)) as fabric:
        loader = fabric.setup_dataloaders(ResumableDataLoader(NUMBERS, batch_size=4))  # type: ignore[arg-type]
        assert (loader.batch_size, len(loader)) == (4, 4)
        assert loader._dataloader.dataset is NUMBERS
        next(iter(loader))
        assert loader.state_dict() == {"batches": 1}
        loader.load_state_dict({"batches": 3})
        assert torch.cat(list(loader)).tolist() == [12, 13, 14, 15]
        assert not hasattr(fabric.setup_dataloaders(DataLoader(NUMBERS)), "state_dict")  # type: ignore[arg-type]


def test_the_users_dataloader_is_still_there(pool) -> None:
    pool(1)(attributes)
