"""``python -m fabric_tp.testing litgpt``: every litgpt config, made small, against one device; and other models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse import auto_cli
from torch import nn

from fabric_tp.parallelize import ActivationCheckpointing, Parallelize, auto
from fabric_tp.plan import CannotSplit
from fabric_tp.testing.generation import Generated, OwnGenerate, compare_generated
from fabric_tp.testing.parity import BuildModel, Report, compare, next_token_loss
from fabric_tp.testing.ranks import Ranks
from fabric_tp.testing.small import (
    LENGTH,
    LORA,
    OWN_GENERATE,
    VOCABULARY,
    causal_types,
    names,
    one_of_each_structure,
    small_causal,
    small_config,
    small_gpt,
    small_inputs,
    small_lora,
)
from fabric_tp.testing.tp_plan import left_whole

Models = Literal["litgpt", "lora", "huggingface"]


def main(
    models: Models,
    *,
    tensor_parallel_size: int = 2,
    data_parallel_size: int = 1,
    sequence_parallel: bool = True,
    loss_parallel: bool = True,
    replicate_attention: bool = False,
    overlap: bool = False,
    activation_checkpointing: ActivationCheckpointing = "none",
    only: str = "",
    every: int = 1,
    steps: int = 1,
    generate: bool = False,
) -> None:
    """Compare models, made small, with one device: a line for each, and exit code 1 on a mismatch or an error.

    Args:
        models: "litgpt": each of its configs. "lora": litgpt.lora.GPT, one config of each structure, with every layer
            adapted, with queries and values only and with MLPs only. "huggingface": each type of causal language model
            that the installed Transformers knows. Those that are not built, or do not run, small are not compared.
            Those that are refused without replicate_attention are compared with it: "mixers whole". Where Transformers'
            own tp_plan splits something that fabric_tp leaves whole, the line says what.
        tensor_parallel_size: Ranks that share the model.
        data_parallel_size: Ranks that share the batch.
        sequence_parallel: As in fabric_tp.auto.
        loss_parallel: As in fabric_tp.auto.
        replicate_attention: As in fabric_tp.auto.
        overlap: As in fabric_tp.auto, with batches of four.
        activation_checkpointing: As in fabric_tp.auto.
        only: Take only models whose name contains this.
        every: Take only every so manieth model.
        steps: Optimizer steps whose weights to compare.
        generate: Compare generated tokens instead: the likeliest ones, of a batch of prompts of different lengths and
            of a long one, with those that the model's library gives on one device. Where the library cannot generate,
            or gives other tokens than its model without a cache, the line says so, and the model is what must be met.
    """
    parallelize_fn = auto(
        sequence_parallel=sequence_parallel,
        loss_parallel=loss_parallel,
        replicate_attention=replicate_attention,
        overlap=overlap,
        activation_checkpointing=activation_checkpointing,
    )
    ranks = Ranks(data_parallel_size * tensor_parallel_size)
    sizes = (data_parallel_size, tensor_parallel_size)
    own = OWN_GENERATE["huggingface" if models == "huggingface" else "litgpt"]
    compared = partial(_tokens, own=own) if generate else partial(_training, steps=steps)
    totals = {"equal": 0, "refused": 0, "not built": 0, "ERROR": 0, "DIFFERENT": 0}
    for name, build in [(name, build) for name, build in _builders(models).items() if only in name][::every]:
        try:
            verdict, detail = _verdict(build, parallelize_fn, ranks, sizes, compared)
        except CannotSplit:
            verdict, detail = _verdict(build, replace(parallelize_fn, replicate_attention=True), ranks, sizes, compared)
            detail = f"mixers whole, {detail}"
        totals[verdict] += 1
        print(f"{name:40} {verdict:10} {detail}", flush=True)
    ranks.stop()
    print(", ".join(f"{number} {verdict}" for verdict, number in totals.items()))
    sys.exit(1 if totals["DIFFERENT"] or totals["ERROR"] else 0)


def _builders(models: Models) -> dict[str, BuildModel]:
    if models == "litgpt":
        return {name: partial(small_gpt, small_config(name)) for name in names()}
    if models == "lora":
        pairs = [(name, adapted) for name in one_of_each_structure() for adapted in LORA]
        return {f"{name}, {adapted}": partial(small_lora, name, adapted) for name, adapted in pairs}
    return {name: partial(small_causal, name) for name in causal_types()}


class Case(NamedTuple):
    """A model that is to be compared, and how it is parallelized."""

    build: BuildModel
    parallelize_fn: Parallelize
    sizes: tuple[int, int]
    model: nn.Module
    inputs: Any
    """What it takes."""


Compared = Callable[[Case, Ranks], tuple[str, str]]
"""Gives a verdict and its details."""


def _verdict(
    build: BuildModel, parallelize_fn: Parallelize, ranks: Ranks, sizes: tuple[int, int], compared: Compared
) -> tuple[str, str]:
    batch = (4 if parallelize_fn.overlap else 2) * sizes[0]
    tokens = torch.randint(VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    try:
        model = build()
        with torch.no_grad():
            inputs = small_inputs(model, tokens)
            model(**inputs) if isinstance(inputs, dict) else model(inputs)
    except Exception as error:
        return "not built", _first_line(error)
    try:
        parallelize_fn.check(model, tensor_parallel_size=sizes[1])
    except CannotSplit:
        raise
    except ValueError as error:
        return "refused", str(error)
    except Exception as error:
        return "ERROR", _first_line(error)
    try:
        return compared(Case(build, parallelize_fn, sizes, model, inputs), ranks)
    except AssertionError as error:
        return "DIFFERENT", str(error).strip().splitlines()[-1]


def _training(case: Case, ranks: Ranks, *, steps: int) -> tuple[str, str]:
    differences = ranks(compare, case.build, case.parallelize_fn, case.inputs, next_token_loss, case.sizes, steps)
    report = Report(differences)
    worst, off = report.worst
    whole = left_whole(case.parallelize_fn.plan(case.model, tensor_parallel_size=case.sizes[1]), case.model)
    more = f"; whole, and split by its tp_plan: {', '.join(whole)}" if whole else ""
    return ("equal" if report.equal else "DIFFERENT"), f"{off:.1e} {worst}{more}"


def _tokens(case: Case, ranks: Ranks, *, own: OwnGenerate) -> tuple[str, str]:
    generated: Generated = ranks(compare_generated, case.build, case.parallelize_fn, own, case.sizes)
    said = f"; its own: {generated.error}" if generated.error else ""
    if generated.equals_own:
        return "equal", f"{'all' if generated.equals_whole else 'as its own, not as without a cache'}{said}"
    if generated.equals_whole:
        return "equal", f"as without a cache{said or '; its own differs'}"
    return "DIFFERENT", f"{generated}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    auto_cli(main)
