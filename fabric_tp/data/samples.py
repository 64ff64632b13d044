"""Augmentation that depends on the sample, not on the worker, the mesh or what was drawn before."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch.utils.data import Dataset

from fabric_tp.data.streams import RandomStream
from fabric_tp.seeds import mix


class SeededSamples(Dataset):
    """A map-style dataset whose random transforms depend on the seed and the sample's number in the run only.

    ``seeded[number, index]`` is ``dataset[index]`` with the random states of Python, NumPy and torch's CPU seeded from
    ``(seed, number)``, and put back afterwards. So the sampler yields pairs: ``number`` counts the samples of the run,
    over all epochs and data-parallel ranks.

    Args:
        dataset: Any map-style dataset.
        seed: The run's seed.

    Example::

        dataset = SeededSamples(dataset, seed=42)
        loader = DataLoader(dataset, batch_sampler=sampler)  # which yields lists of (number, index)
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, Any]) -> Any:
        number, index = item
        with RandomStream(mix(self.seed, "sample", number)).active():
            return self.dataset[index]
