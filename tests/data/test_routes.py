"""The ways in which the ranks of a tensor-parallel group get different batches without anyone noticing.

Each of them with Fabric's own strategy, where they do, and with ours: repaired (the same batches), refused (an error
when the dataloader is set up) or caught (an error in the model's forward, or at the end of the dataloader).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler
from torch.utils.data.datapipes.iter import IterableWrapper

from tests.data import litdata_files
from tests.data.fabric import Mean, forked_workers, gather, on_ranks
from tests.data.stand_ins import MosaicDataset, ResumableDataLoader

SAMPLES, BATCH = 16, 2


class Numbers(Dataset):
    """Sample ``i`` is ``[i, noise]``."""

    def __init__(self, size: int = SAMPLES, noise: Callable[[], Any] = lambda: 0.0) -> None:
        self.size, self.noise = size, noise

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, float(self.noise())])


class Stream(IterableDataset):
    def __init__(self, numbers: Callable[[], Iterator[int]]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(number)]) for number in self.numbers())


class ShuffledSampler(Sampler[int]):
    """As many a user's own: it draws from Python's global random state."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(self.size), self.size))


def noise() -> float:
    return float(torch.rand(())) + random.random()


def this_rank() -> int:
    return dist.get_rank()


def every_second_by_rank() -> Iterator[int]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return iter(range(rank, 2 * SAMPLES, size))


def longer_on_later_ranks() -> Iterator[int]:
    return iter(range(SAMPLES + 2 * this_rank()))


# Each gives the dataloader of one rank, set up


def random_transform_in_workers(fabric: L.Fabric, path: Path) -> Any:
    fabric.seed_everything(7, workers=True, verbose=False)
    return fabric.setup_dataloaders(DataLoader(Numbers(noise=noise), BATCH, **forked_workers(2)))


def iterable_that_shards_by_rank(fabric: L.Fabric, path: Path) -> Any:
    return fabric.setup_dataloaders(DataLoader(Stream(every_second_by_rank), BATCH))


def litdata_streaming(fabric: L.Fabric, path: Path) -> Any:
    return fabric.setup_dataloaders(litdata_files.dataloader(path, BATCH))


def litdata_streaming_in_workers(fabric: L.Fabric, path: Path) -> Any:
    return fabric.setup_dataloaders(litdata_files.dataloader(path, BATCH, num_workers=2))


def litdata_combined(fabric: L.Fabric, path: Path) -> Any:
    return fabric.setup_dataloaders(litdata_files.combined_dataloader(path, BATCH))


def mosaic_streaming(fabric: L.Fabric, path: Path) -> Any:
    return fabric.setup_dataloaders(DataLoader(MosaicDataset(SAMPLES), BATCH))


def datapipe(fabric: L.Fabric, path: Path) -> Any:
    pipe = IterableWrapper([torch.tensor([float(number)]) for number in range(2 * SAMPLES)]).sharding_filter()
    return fabric.setup_dataloaders(DataLoader(pipe, BATCH, **forked_workers(1)))


def ready_made_distributed_sampler(fabric: L.Fabric, path: Path) -> Any:
    dataset = Numbers()
    return fabric.setup_dataloaders(DataLoader(dataset, BATCH, sampler=DistributedSampler(dataset)))


def shuffle_without_distributed_sampler(fabric: L.Fabric, path: Path) -> Any:
    torch.manual_seed(this_rank())
    return fabric.setup_dataloaders(DataLoader(Numbers(), BATCH, shuffle=True), use_distributed_sampler=False)


def custom_sampler(fabric: L.Fabric, path: Path) -> Any:
    random.seed(this_rank())
    return fabric.setup_dataloaders(DataLoader(Numbers(), BATCH, sampler=ShuffledSampler(SAMPLES)))


def seed_by_rank(fabric: L.Fabric, path: Path) -> Any:
    fabric.seed_everything(7 + fabric.global_rank, verbose=False)
    return fabric.setup_dataloaders(DataLoader(Numbers(), BATCH, shuffle=True))


def no_seed_in_the_constructor(fabric: L.Fabric, path: Path) -> Any:
    data = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(this_rank()))
    return fabric.setup_dataloaders(DataLoader(data, BATCH))  # type: ignore[arg-type]


def drift_before_a_transform(fabric: L.Fabric, path: Path) -> Any:
    fabric.seed_everything(7, verbose=False)
    if fabric.global_rank == 0:
        noise()
    return fabric.setup_dataloaders(DataLoader(Numbers(noise=noise), BATCH))


def look_on_the_first_rank(fabric: L.Fabric, path: Path) -> Any:
    fabric.seed_everything(7, verbose=False)
    loader = fabric.setup_dataloaders(DataLoader(Numbers(noise=noise), BATCH, shuffle=True))
    if fabric.global_rank == 0:
        next(iter(loader))
    return loader


def order_of_a_set(fabric: L.Fabric, path: Path) -> Any:
    names = {f"file-{number}" for number in range(SAMPLES)}
    listing = sorted(names, key=lambda name: hash((name, this_rank())))
    data = [torch.tensor([float(name.removeprefix("file-"))]) for name in listing]
    return fabric.setup_dataloaders(DataLoader(data, BATCH))  # type: ignore[arg-type]


def different_lengths(fabric: L.Fabric, path: Path) -> Any:
    return fabric.setup_dataloaders(DataLoader(Numbers(SAMPLES + 8 * this_rank()), BATCH))


def different_unknown_lengths(fabric: L.Fabric, path: Path) -> Any:
    return fabric.setup_dataloaders(DataLoader(Stream(longer_on_later_ranks), BATCH))


def resume_on_the_first_rank(fabric: L.Fabric, path: Path) -> Any:
    loader = fabric.setup_dataloaders(ResumableDataLoader(Numbers(), BATCH))
    if fabric.global_rank == 0:
        loader._dataloader.load_state_dict({"batches": 3})
    return loader


@dataclass
class Route:
    setup: Callable[[L.Fabric, Path], Any]
    outcome: str
    message: str = ""
    broadcast: bool = True
    """Whether broadcast_inputs is a way out; otherwise it is the same as without."""


ROUTES = {
    "1 transforms in workers": Route(random_transform_in_workers, "repaired"),
    "2 iterable dataset": Route(iterable_that_shards_by_rank, "caught", "batch 0 of epoch 0 of dataloader 0"),
    "3 litdata": Route(litdata_streaming, "repaired"),
    "3 litdata in workers": Route(litdata_streaming_in_workers, "repaired"),
    "3 litdata, combined": Route(litdata_combined, "repaired"),
    "4 MosaicML": Route(mosaic_streaming, "refused", "replication=2", broadcast=False),
    "5 datapipe": Route(datapipe, "caught", "batch 0 of epoch 0 of dataloader 0", broadcast=False),
    "6 ready-made DistributedSampler": Route(ready_made_distributed_sampler, "repaired"),
    "7 no DistributedSampler": Route(shuffle_without_distributed_sampler, "repaired"),
    "8 custom sampler": Route(custom_sampler, "repaired"),
    "9 seed by rank": Route(seed_by_rank, "refused", "different seeds", broadcast=False),
    "10 no seed": Route(no_seed_in_the_constructor, "caught", "batch 0 of epoch 0 of dataloader 0"),
    "11 drift": Route(drift_before_a_transform, "repaired"),
    "12 epochs": Route(look_on_the_first_rank, "repaired", broadcast=False),
    "13 order of files": Route(order_of_a_set, "caught", "batch 0 of epoch 0 of dataloader 0"),
    "14 lengths": Route(different_lengths, "refused", "batches on the ranks"),
    "14 unknown lengths": Route(different_unknown_lengths, "caught", "has ended after 8 batches on ranks [0]"),
    "15 resume": Route(resume_on_the_first_rank, "caught", "batch 0 of epoch 0 of dataloader 0"),
}


@dataclass
class Run:
    batches: list[list[Any]]
    """Of two epochs, epoch after epoch."""
    error: str | None


def run(name: str, ours: bool, sizes: tuple[int, int], path: Path, **options: Any) -> list[Run]:
    """What each rank got."""
    batches: list[list[Any]] = []
    error = None
    with on_ranks(sizes, ours, **options) as fabric:
        model = fabric.setup(Mean())
        try:
            loader = ROUTES[name].setup(fabric, path)
            for _ in range(2):
                for batch in loader:
                    model(batch)
                    batches.append(batch.tolist())
        except ValueError as exception:
            error = str(exception)
        return gather(Run(batches, error))


@pytest.fixture(scope="session")
def path(tmp_path_factory) -> Path:
    """With litdata's files."""
    path = tmp_path_factory.mktemp("litdata")
    litdata_files.write(path, 4 * SAMPLES)
    return path


@pytest.mark.parametrize("name", ROUTES)
def test_fabrics_own_strategy_gives_ranks_different_batches(pool, path, name) -> None:
    first, second = pool(2)(run, name, False, (1, 2), path)
    assert first.error is second.error is None
    assert first.batches != second.batches


def of_outcome(outcome: str) -> list[str]:
    return [name for name, route in ROUTES.items() if route.outcome == outcome]


@pytest.mark.swept(lambda p: p["sizes"] == (1, 2))
@pytest.mark.parametrize("name", of_outcome("repaired"))
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)])
def test_repaired(pool, path, name, sizes) -> None:
    runs = pool(sizes[0] * sizes[1])(run, name, True, sizes, path, verify_inputs=1)
    assert [each.error for each in runs] == [None] * len(runs)
    for first, second in zip(runs[::2], runs[1::2], strict=True):
        assert first.batches == second.batches
        assert first.batches
    if sizes[0] > 1:
        assert runs[0].batches != runs[2].batches


@pytest.mark.parametrize("name", [*of_outcome("refused"), *of_outcome("caught")])
def test_refused_or_caught(pool, path, name) -> None:
    runs = pool(2)(run, name, True, (1, 2), path, verify_inputs=1)
    for each in runs:
        assert each.error
        assert ROUTES[name].message in each.error


@pytest.mark.parametrize("name", of_outcome("caught"))
def test_nothing_is_caught_without_verification(pool, path, name) -> None:
    """So it is the verification that catches it; but ranks end a pass together in any case."""
    runs = pool(2)(run, name, True, (1, 2), path, verify_inputs=0)
    assert all(bool(each.error) == (name in ("14 unknown lengths", "15 resume")) for each in runs)


@pytest.mark.parametrize("name", [name for name, route in ROUTES.items() if route.broadcast])
def test_broadcast_is_safe_for_all(pool, path, name) -> None:
    first, second = pool(2)(run, name, True, (1, 2), path, broadcast_inputs=True, verify_inputs=1)
    assert first.error is second.error is None
    assert first.batches == second.batches
    assert first.batches


def test_broadcast_names_the_rank_that_looks_alone(pool, path) -> None:
    for each in pool(2)(run, "12 epochs", True, (1, 2), path, broadcast_inputs=True, verify_inputs=0):
        assert "batch 0 of pass 1 on rank 0, batch 3 of pass 0 on rank 1" in str(each.error)


def test_broadcast_of_a_datapipe_is_refused(pool, path) -> None:
    for each in pool(2)(run, "5 datapipe", True, (1, 2), path, broadcast_inputs=True):
        assert "broadcast_inputs=True does not work with datapipes" in str(each.error)
