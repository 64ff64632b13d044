"""Which samples each step of each process sees, as batches of inputs and targets."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from arguments import Args, Job, Sizes
from data import vocabulary_size
from litgpt import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from fabric_tp.data import SeededSamples

IGNORE = -100  # targets that do not count: prompts and padding in litgpt's instruction data

Batch = tuple[Tensor, Tensor]
"""Inputs (b, t) and the targets (b, t) that follow them, integers."""


class Batches:
    """The data of a run, of which this process sees its data-parallel rank's part: pairs of inputs and targets."""

    def __init__(self, fabric: L.Fabric, job: Job) -> None:
        self.fabric, self.args, self.sizes = fabric, job.args, job.sizes
        data = job.args.data
        with fabric.rank_zero_first(local=True):
            data.prepare_data()
        data.setup()
        self.tokenizer: Tokenizer = job.tokenizer or data.tokenizer  # type: ignore[attr-defined]
        self.train_data, self.val_data = data.train_dataloader(), data.val_dataloader()
        check_data(job, self)

    def training(self, first_step: int) -> Iterator[Batch]:
        """The micro-batches of all steps after `first_step`."""
        if self.stream is not None:
            return self._pairs(over_and_over(self.stream))
        num_steps = max(0, self.args.max_steps - first_step)
        loader = in_global_order(
            self.fabric, self.sizes, self.train_data, seed=self.args.seed, first_step=first_step, num_steps=num_steps
        )
        return self._pairs(loader)

    def validation(self) -> Iterator[Batch]:
        """The same batches every time, at most `eval_steps` global ones."""
        return self._pairs(self._validation)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of them. Where samples are ours to order, the number of steps says it all."""
        return {"train_data": self.stream} if hasattr(self.stream, "state_dict") else {}

    @cached_property
    def stream(self) -> DataLoader | None:
        """The training data, if it is streamed."""
        if number_of(self.train_data) is not None:
            return None
        return self.fabric.setup_dataloaders(self.train_data)  # type: ignore[return-value]

    @cached_property
    def _validation(self) -> Iterable[Any]:
        sizes, steps, samples = self.sizes, self.args.eval_steps, number_of(self.val_data)
        if samples is None:
            return FirstBatches(self.fabric.setup_dataloaders(self.val_data), steps * sizes.accumulate)
        if samples < sizes.global_batch:  # then all of them, as far as they can be divided
            sizes = replace(sizes, global_batch=samples - samples % sizes.data_parallel, micro_batch=1)
        steps = min(steps, samples // sizes.global_batch)
        return in_global_order(self.fabric, sizes, self.val_data, seed=0, first_step=0, num_steps=steps)

    def _pairs(self, loader: Iterable[Any]) -> Iterator[Batch]:
        return (inputs_and_targets(self.args, self.sizes, batch) for batch in loader)


@dataclass(frozen=True)
class FirstBatches:
    loader: Iterable[Any]
    number: int

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.number)


def over_and_over(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def number_of(loader: DataLoader) -> int | None:
    """Its samples; None if they are streamed."""
    return None if isinstance(loader.dataset, IterableDataset) else len(loader.dataset)  # type: ignore[arg-type]


def check_data(job: Job, batches: Batches) -> None:
    args, sizes, config = job.args, job.sizes, job.config
    training, validation = ("training", batches.train_data), ("validation", batches.val_data)
    for (name, loader), needed in ((training, sizes.global_batch), (validation, sizes.data_parallel)):
        samples = number_of(loader)
        if samples is not None and samples < needed:  # the length of a stream is not known
            raise ValueError(
                f"There are {samples} samples of {args.max_seq_length} tokens for {name}, fewer than the {needed} that"
                " are used at once. Give more text, or lower --max_seq_length or, for training, --global_batch_size."
            )
    tokens, rows = vocabulary_size(batches.tokenizer), config.padded_vocab_size
    if tokens > rows:  # type: ignore[operator]
        raise ValueError(
            f"The tokenizer has {tokens} tokens and {config.name} only {rows} rows in its embedding. Use the model's"
            " own tokenizer; for the default data, lower --data.vocab_size or raise --model.vocab_size."
        )


def inputs_and_targets(args: Args, sizes: Sizes, batch: Any) -> Batch:
    """Of a batch of either kind that litgpt's data has.

    Instruction data is as long as its longest sample: it is padded on the right, unseen by the causal attention, to a
    length that sequence parallelism can split.
    """
    if isinstance(batch, Tensor):  # (b, t + 1) tokens
        return batch[:, :-1].long(), batch[:, 1:].long()
    inputs, targets = batch["input_ids"][:, :-1].long(), batch["labels"][:, 1:].long()
    padding = -inputs.shape[1] % (sizes.tensor_parallel if args.sequence_parallel else 1)
    return F.pad(inputs, (0, padding), value=0), F.pad(targets, (0, padding), value=IGNORE)


def in_global_order(
    fabric: L.Fabric, sizes: Sizes, loader: DataLoader, *, seed: int, first_step: int, num_steps: int
) -> DataLoader:
    """The loader's samples in an order that depends on the seed and the global batch only, from any step on."""
    data_parallel_mesh = fabric.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined]
    sampler = GlobalBatchSampler(
        len(loader.dataset),  # type: ignore[arg-type]
        global_batch_size=sizes.global_batch,
        micro_batch_size=sizes.micro_batch,
        data_parallel_rank=data_parallel_mesh.get_local_rank(),
        data_parallel_size=sizes.data_parallel,
        seed=seed,
        first_step=first_step,
        num_steps=num_steps,
    )
    loader = DataLoader(
        SeededSamples(loader.dataset, seed),
        batch_sampler=sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        # A worker forked from this process may find a lock for ever taken that one of its threads held at the time.
        multiprocessing_context="forkserver" if loader.num_workers else None,
        persistent_workers=loader.num_workers > 0,
        pin_memory=fabric.device.type == "cuda",
    )
    return fabric.setup_dataloaders(loader, use_distributed_sampler=False)  # type: ignore[return-value]


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one data-parallel rank, for any range of steps.

    It produces pairs: the number of the sample in the whole run, which `fabric_tp.data.SeededSamples` makes random
    transforms depend on, and its index in the dataset.

    A step takes the next `global_batch_size` samples of the epoch's permutation, and rank r of d every d-th of
    them from the r-th on. So a step sees the same samples on every mesh and for every micro-batch size, and a
    run resumed at `first_step` sees what the interrupted run would have seen, without reading what it skips.
    A rest that does not fill a global batch is left out of its epoch.

    Args:
        num_samples: The size of the dataset.
        seed: Shuffles every epoch differently.
        first_step: The first step to produce, counted from 0 over all epochs.
        num_steps: How many steps to produce.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        first_step: int = 0,
        num_steps: int,
    ) -> None:
        self.num_samples = num_samples
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.seed, self.first_step, self.num_steps = seed, first_step, num_steps

    def __len__(self) -> int:
        return self.num_steps * (self.global_batch_size // (self.data_parallel_size * self.micro_batch_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_samples // self.global_batch_size
        current_epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.first_step, self.first_step + self.num_steps):
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            if epoch != current_epoch:
                current_epoch = epoch
                order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(self.seed + epoch))
            start = step_of_epoch * self.global_batch_size
            global_batch = order[start : start + self.global_batch_size].tolist()
            numbered = list(enumerate(global_batch, step * self.global_batch_size))
            mine = numbered[self.data_parallel_rank :: self.data_parallel_size]
            for i in range(0, len(mine), self.micro_batch_size):
                yield mine[i : i + self.micro_batch_size]
