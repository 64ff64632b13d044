"""Make a dataloader give the same batches to all ranks of a tensor-parallel group, as far as its parts allow it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, DistributedSampler

from fabric_tp.data.streams import RandomStream
from fabric_tp.seeds import mix


class Preparation:
    """A dataloader whose randomness and shards depend on the data-parallel rank.

    The dataloader's samplers, datasets, ``generator`` and ``worker_init_fn`` are changed in place, as Fabric does.

    Args:
        dataloader: After Fabric has given it a sampler.
        data_parallel_rank: Of this rank.
        data_parallel_size: The ranks that get different batches.
        tensor_parallel_size: The ranks that get the same batches.
        seed: Equal on all ranks, different for each dataloader.

    Raises:
        ValueError: A sampler or a streaming dataset was made for other ranks, and cannot be told.
    """

    def __init__(
        self,
        dataloader: DataLoader,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
        tensor_parallel_size: int,
        seed: int,
    ) -> None:
        self._seed, self._rank = seed, data_parallel_rank
        self._samplers = _samplers(dataloader)
        for sampler in self._samplers:
            _repair_sampler(sampler, data_parallel_rank, data_parallel_size, tensor_parallel_size)
            if isinstance(sampler, DistributedSamplerWrapper):
                # each rank shards its own copy of the order, so that has to be the same on all ranks
                order: Any = sampler.dataset
                order._sampler = _SharedOrder(order._sampler, mix(seed, "order"))
        for dataset in _parts(dataloader.dataset):
            _repair_dataset(dataset, data_parallel_rank, data_parallel_size, tensor_parallel_size)
        _seed_workers(dataloader, data_parallel_rank)
        given = getattr(dataloader, "generator", None)
        self._own_seed = given.initial_seed() if given else 0
        self._generator = _own_generator(dataloader, self._samplers)

    def start_pass(self, epoch: int) -> RandomStream:
        """Set the epoch of the samplers and the seed of the workers; what the main process draws from meanwhile."""
        for sampler in self._samplers:
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        self._generator.manual_seed(mix(self._seed, "workers", self._own_seed, epoch, self._rank))
        return RandomStream(mix(self._seed, "main", epoch, self._rank))


class _SharedOrder:
    """A sampler whose order is the same on all ranks, whatever state their random generators are in."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        with RandomStream(mix(self.seed, self.epoch)).active():
            order = list(self.sampler)
        return iter(order)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if callable(set_epoch := getattr(self.sampler, "set_epoch", None)):
            set_epoch(epoch)


def _samplers(dataloader: DataLoader) -> list[Any]:
    """Of the dataloader and of its batch sampler; the same places in which Fabric sets the epoch."""
    found = [getattr(dataloader, "sampler", None), getattr(dataloader, "batch_sampler", None)]
    found.append(getattr(found[-1], "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _repair_sampler(sampler: Any, rank: int, size: int, tensor_parallel_size: int) -> None:
    given = (getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None))
    if not all(isinstance(number, int) for number in given) or given == (rank, size):
        return
    made_for_all_ranks = given[1] == size * tensor_parallel_size
    if not made_for_all_ranks or not _is_counted_as_usual(sampler):
        raise ValueError(
            f"This {type(sampler).__name__} has num_replicas={given[1]} and rank={given[0]}, but batches are split over"
            f" {size} data-parallel ranks, of which this is {rank}; the {tensor_parallel_size} ranks of a"
            " tensor-parallel group get the same. Leave the sampler to Fabric, or make it with"
            " **fabric.strategy.distributed_sampler_kwargs."
        )
    sampler.num_replicas, sampler.rank = size, rank
    sampler.num_samples = _num_samples(sampler)
    sampler.total_size = sampler.num_samples * size


def _is_counted_as_usual(sampler: Any) -> bool:
    """Whether a sampler's sizes follow from its replicas as DistributedSampler's do, so that they can be redone."""
    if not isinstance(sampler, DistributedSampler):
        return False
    sizes = (_num_samples(sampler), _num_samples(sampler) * sampler.num_replicas)
    return (sampler.num_samples, sampler.total_size) == sizes


def _num_samples(sampler: Any) -> int:
    """The formula of ``DistributedSampler.__init__``."""
    length, replicas = len(sampler.dataset), sampler.num_replicas
    if sampler.drop_last and length % replicas:
        return math.ceil((length - replicas) / replicas)
    return math.ceil(length / replicas)


def _parts(dataset: Any) -> Iterator[Any]:
    """The dataset and what it is made of: ``.dataset`` of wrappers, ``.datasets`` or ``._datasets`` of mixtures."""
    pending, seen = [dataset], set()
    while pending:
        part = pending.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        inside = vars(part) if hasattr(part, "__dict__") else {}
        pending.append(inside.get("dataset"))
        for mixture in (inside.get("datasets"), inside.get("_datasets")):
            pending.extend(mixture if isinstance(mixture, (list, tuple)) else [])


def _repair_dataset(dataset: Any, rank: int, size: int, tensor_parallel_size: int) -> None:
    if _is_from("litdata", dataset) and hasattr(dataset, "distributed_env"):
        environment = copy.copy(dataset.distributed_env)
        environment.world_size, environment.global_rank = size, rank
        # each of its nodes has as many ranks; where a tensor-parallel group spans nodes, they are one to litdata
        environment.num_nodes = math.gcd(environment.num_nodes, size)
        dataset.distributed_env = environment
    if _is_from("streaming", dataset) and tensor_parallel_size > 1 and hasattr(dataset, "replication"):
        if dataset.replication == tensor_parallel_size:
            return
        raise ValueError(
            f"This {type(dataset).__name__} has replication={dataset.replication}, so it gives different samples to the"
            f" {tensor_parallel_size} ranks of a tensor-parallel group. Make it with"
            f" replication={tensor_parallel_size}."
        )


def _is_from(package: str, dataset: Any) -> bool:
    return any(base.__module__.partition(".")[0] == package for base in type(dataset).__mro__)


def _seed_workers(dataloader: DataLoader, rank: int) -> None:
    """Lightning's seeds mix in the global rank; a function of the user's own is left alone."""
    function = getattr(dataloader, "worker_init_fn", None)
    if isinstance(function, partial):
        function = function.func
    if function is pl_worker_init_function:
        dataloader.worker_init_fn = partial(pl_worker_init_function, rank=rank)


def _own_generator(dataloader: DataLoader, samplers: list[Any]) -> torch.Generator:
    """What the seeds of the workers are drawn from, and random orders where the user's generator was for them too."""
    given, own = getattr(dataloader, "generator", None), torch.Generator()
    for sampler in samplers:
        if given is not None and getattr(sampler, "generator", None) is given:
            sampler.generator = own
    dataloader.generator = own
    return own
