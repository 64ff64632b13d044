"""Bytes that each rank sends, by dimension of the mesh, are those of the formulas."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from fabric_tp import _torch
from fabric_tp.measure.communication import Collective, CollectiveCounter, ring_bytes
from fabric_tp.testing.ranks import mesh


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [("all-gather", 4, 750), ("reduce-scatter", 4, 750), ("all-reduce", 4, 1500), ("all-reduce", 2, 1000)],
)
def test_bytes_in_a_ring(kind, size, expected) -> None:
    assert ring_bytes(kind, 1000, size) == expected


def test_one_rank_sends_nothing() -> None:
    assert ring_bytes("all-reduce", 1000, 1) == 0


def functional() -> list[Collective]:
    """What styles issue, each on the whole of 1 KiB."""
    group = mesh(2, 2)["tensor_parallel"].get_group()
    part, whole = torch.zeros(128), torch.zeros(256)
    with CollectiveCounter(mesh(2, 2)) as counter:
        counter.phase = "forward"
        _torch.all_gather(part, 2, group.group_name)
        _torch.reduce_scatter(whole, 2, group.group_name)
        counter.phase = "backward"
        _torch.all_reduce(whole, group.group_name)
        _torch.all_reduce(whole, group.group_name, "max")
    return counter.collectives


def test_functional_collectives(pool) -> None:
    found = pool(4)(functional)
    assert [each.kind for each in found] == ["all-gather", "reduce-scatter", "all-reduce", "all-reduce"]
    assert {(each.axis, each.size, each.nbytes) for each in found} == {("tensor_parallel", 2, 1024)}
    assert [each.phase for each in found] == ["forward", "forward", "backward", "backward"]


def in_place() -> list[Collective]:
    """What ``torch.distributed`` itself offers, over the other dimension and over all ranks."""
    data = mesh(2, 2)["data_parallel"].get_group()
    part, whole = torch.zeros(128), torch.zeros(256)
    with CollectiveCounter(mesh(2, 2)) as counter:
        dist.all_reduce(whole, group=data)
        dist.all_gather_into_tensor(whole, part, group=data)
        dist.reduce_scatter_tensor(part, whole, group=data)
        dist.broadcast(whole, group=data, group_src=0)
        dist.all_reduce(whole)
        dist.barrier()
    return counter.collectives


def test_collectives_in_place(pool) -> None:
    found = pool(4)(in_place)
    assert [each.kind for each in found] == ["all-reduce", "all-gather", "reduce-scatter", "broadcast", "all-reduce"]
    assert [each.axis for each in found] == ["data_parallel"] * 4 + ["mesh"]
    assert [each.size for each in found] == [2, 2, 2, 2, 4]
    assert {each.nbytes for each in found} == {1024}


def one_rank() -> int:
    group = mesh(1, 2)["data_parallel"].get_group()
    with CollectiveCounter(mesh(1, 2)) as counter:
        dist.all_reduce(torch.zeros(4), group=group)
    return len(counter.collectives)


def test_a_rank_alone_is_not_counted(pool) -> None:
    assert pool(2)(one_rank) == 0


def fully_sharded_step() -> list[Collective]:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    for layer in model:
        fully_shard(layer, mesh=mesh(2, 1)["data_parallel"], reshard_after_forward=True)
    with CollectiveCounter(mesh(2, 1)) as counter:
        model(torch.ones(1, 32)).sum().backward()
    return counter.collectives


def test_fsdp_gathers_twice_and_scatters_once(pool) -> None:
    found = pool(2)(fully_sharded_step)
    assert {each.axis for each in found} == {"data_parallel"}
    assert {each.nbytes for each in found} == {4 * 32 * 32}
    kinds = [each.kind for each in found]
    assert (kinds.count("all-gather"), kinds.count("reduce-scatter")) == (4, 2)
