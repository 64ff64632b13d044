"""``python -m fabric_tp.testing litgpt``: every litgpt config, made small, against one device."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from jsonargparse import auto_cli

import fabric_tp
from fabric_tp.testing.parity import Report, compare, next_token_loss
from fabric_tp.testing.ranks import Ranks
from fabric_tp.testing.small import LENGTH, VOCABULARY, names, small_config, small_gpt


def litgpt(
    *,
    tensor_parallel_size: int = 2,
    data_parallel_size: int = 1,
    sequence_parallel: bool = True,
    loss_parallel: bool = True,
    replicate_attention: bool = False,
    only: str = "",
    every: int = 1,
    steps: int = 1,
) -> None:
    """Compare each of litgpt's configs, made small, with one device: a line for each, and exit code 1 on a mismatch.

    Args:
        tensor_parallel_size: Ranks that share the model.
        data_parallel_size: Ranks that share the batch.
        sequence_parallel: As in fabric_tp.litgpt.
        loss_parallel: As in fabric_tp.litgpt.
        replicate_attention: As in fabric_tp.litgpt.
        only: Take only configs whose name contains this.
        every: Take only every so manieth config.
        steps: Optimizer steps whose weights to compare.
    """
    parallelize_fn = fabric_tp.litgpt(
        sequence_parallel=sequence_parallel, loss_parallel=loss_parallel, replicate_attention=replicate_attention
    )
    ranks = Ranks(data_parallel_size * tensor_parallel_size)
    totals = {"equal": 0, "refused": 0, "DIFFERENT": 0}
    for name in [name for name in names() if only in name][::every]:
        verdict, detail = _verdict(name, parallelize_fn, ranks, (data_parallel_size, tensor_parallel_size), steps)
        totals[verdict] += 1
        print(f"{name:40} {verdict:10} {detail}", flush=True)
    ranks.stop()
    print(", ".join(f"{number} {verdict}" for verdict, number in totals.items()))
    sys.exit(1 if totals["DIFFERENT"] else 0)


def _verdict(
    name: str, parallelize_fn: fabric_tp.Parallelize, ranks: Ranks, sizes: tuple[int, int], steps: int
) -> tuple[str, str]:
    config = small_config(name)
    build: Any = partial(small_gpt, config)
    try:
        parallelize_fn.check(build(), tensor_parallel_size=sizes[1])
    except ValueError as error:
        return "refused", str(error)
    tokens = torch.randint(VOCABULARY, (2 * sizes[0], LENGTH), generator=torch.Generator().manual_seed(0))
    try:
        report = Report(ranks(compare, build, parallelize_fn, tokens, next_token_loss, sizes, steps))
    except AssertionError as error:
        return "DIFFERENT", str(error).strip().splitlines()[-1]
    worst, off = report.worst
    return ("equal" if report.equal else "DIFFERENT"), f"{off:.1e} {worst}"


if __name__ == "__main__":
    auto_cli({"litgpt": litgpt})
