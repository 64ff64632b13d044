"""Samples whose random transforms depend on their number only."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fabric_tp.data import SeededSamples
from fabric_tp.data.streams import RandomStream


class Noise(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[float]:
        return [index, random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_a_sample_depends_on_seed_number_and_index_only() -> None:
    samples = SeededSamples(Noise(), seed=1)
    first = samples[5, 2]
    samples[6, 2]
    random.seed(3)
    assert samples[5, 2] == first


@pytest.mark.parametrize(("seed", "number"), [(1, 6), (2, 5)])
def test_another_number_or_seed_gives_another_sample(seed, number) -> None:
    one, other = SeededSamples(Noise(), seed=1)[5, 2], SeededSamples(Noise(), seed)[number, 2]
    assert one[0] == other[0]
    assert all(a != b for a, b in zip(one[1:], other[1:], strict=True))


def test_states_outside_are_left_as_they_were() -> None:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    expected = Noise()[0]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    SeededSamples(Noise(), seed=1)[5, 2]
    assert Noise()[0] == expected


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers) -> None:
    samples, numbers = SeededSamples(Noise(), seed=1), [(10 + i, i) for i in range(8)]
    loaded = DataLoader(samples, batch_size=None, sampler=numbers, num_workers=num_workers)  # type: ignore[arg-type]
    assert [list(map(float, each)) for each in loaded] == [samples[number] for number in numbers]


def test_a_stream_goes_on_where_it_was() -> None:
    whole, parts = RandomStream(4), RandomStream(4)
    with whole.active():
        expected = [Noise()[0], Noise()[1]]
    found = []
    for index in range(2):
        with parts.active():
            found.append(Noise()[index])
        torch.rand(3), random.random()
    assert found == expected
