"""What is changed in a dataloader, and what is left to the user."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, DistributedSampler

from fabric_tp.data.repair import Preparation
from tests.data.stand_ins import MosaicDataset

NUMBERS = torch.arange(10)


def prepare(dataloader: DataLoader, rank: int = 1, size: int = 2, tensor_parallel_size: int = 2) -> Preparation:
    return Preparation(
        dataloader,
        data_parallel_rank=rank,
        data_parallel_size=size,
        tensor_parallel_size=tensor_parallel_size,
        seed=3,
    )


def loader(**options: object) -> DataLoader:
    return DataLoader(NUMBERS, batch_size=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_sampler_of_all_ranks_becomes_one_of_data_parallel_ranks(rank, drop_last) -> None:
    given = DistributedSampler(NUMBERS, num_replicas=4, rank=2 * rank + 1, seed=5, drop_last=drop_last)
    prepare(loader(sampler=given), rank)
    expected = DistributedSampler(NUMBERS, num_replicas=2, rank=rank, seed=5, drop_last=drop_last)
    assert (list(given), len(given)) == (list(expected), len(expected))


def test_right_sampler_is_left_alone() -> None:
    sampler = DistributedSampler(NUMBERS, num_replicas=2, rank=1)
    before = dict(vars(sampler))
    prepare(loader(sampler=sampler))
    assert {**vars(sampler), "epoch": 0} == before


@pytest.mark.parametrize(("replicas", "rank"), [(3, 1), (2, 0), (8, 5)])
def test_sampler_of_other_ranks_is_refused(replicas, rank) -> None:
    sampler = DistributedSampler(NUMBERS, num_replicas=replicas, rank=rank)
    with pytest.raises(ValueError, match=f"num_replicas={replicas} and rank={rank}.* over 2 data-parallel ranks"):
        prepare(loader(sampler=sampler))


def test_sampler_that_counts_in_its_own_way_is_refused() -> None:
    sampler = DistributedSampler(NUMBERS, num_replicas=4, rank=2)
    sampler.num_samples = 1
    with pytest.raises(ValueError, match="distributed_sampler_kwargs"):
        prepare(loader(sampler=sampler))


@pytest.mark.parametrize("given", [pl_worker_init_function, partial(pl_worker_init_function, rank=3)])
def test_lightnings_worker_seeds_get_the_data_parallel_rank(given) -> None:
    dataloader = loader(num_workers=1, worker_init_fn=given)
    prepare(dataloader)
    assert dataloader.worker_init_fn.keywords == {"rank": 1}  # type: ignore[union-attr]


def test_users_own_worker_function_is_kept() -> None:
    dataloader = loader(num_workers=1, worker_init_fn=print)
    prepare(dataloader)
    assert dataloader.worker_init_fn is print


def worker_seed(rank: int, epoch: int, drift: int = 0, generator: torch.Generator | None = None) -> int:
    dataloader = loader(generator=generator)
    preparation = prepare(dataloader, rank)
    torch.rand(drift)
    preparation.start_pass(epoch)
    return int(torch.empty((), dtype=torch.int64).random_(generator=dataloader.generator))


def test_worker_seeds_depend_on_rank_epoch_and_the_users_generator_only() -> None:
    assert worker_seed(0, 0) == worker_seed(0, 0, drift=7)
    others = [worker_seed(1, 0), worker_seed(0, 1), worker_seed(0, 0, generator=torch.Generator().manual_seed(1))]
    assert len({worker_seed(0, 0), *others}) == 4


def test_users_generator_gives_the_order_again_in_the_same_epoch() -> None:
    dataloader = loader(shuffle=True, generator=torch.Generator().manual_seed(1))
    preparation = prepare(dataloader)
    orders = []
    for epoch in (0, 0, 1):
        preparation.start_pass(epoch)
        orders.append(torch.cat(list(dataloader)).tolist())
    assert orders[0] == orders[1] != orders[2]


def test_mosaic_with_the_right_replication_is_accepted() -> None:
    prepare(DataLoader(MosaicDataset(8, replication=2)))
    prepare(DataLoader(MosaicDataset(8)), tensor_parallel_size=1)


def test_streaming_dataset_keeps_its_machines_where_they_fit() -> None:
    for machines, expected in [(1, 1), (2, 2), (4, 2)]:
        environment = SimpleNamespace(world_size=8, global_rank=5, num_nodes=machines)
        dataset = type("Streaming", (), {"__module__": "litdata.streaming.dataset"})()
        dataset.distributed_env = environment
        wrapper = SimpleNamespace(dataset=SimpleNamespace(_datasets=[dataset]))
        prepare(DataLoader(wrapper, sampler=[0]))  # type: ignore[arg-type]
        found = dataset.distributed_env
        assert (found.world_size, found.global_rank, found.num_nodes) == (2, 1, expected)
        assert environment.world_size == 8
