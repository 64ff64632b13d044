"""Low-rank adapters of a ``litgpt.lora.GPT``, as PEFT keeps those of Transformers' model of the same weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_tp.architectures.hub import grouped, hub_names
from fabric_tp.checkpoint.atomic import replacing
from fabric_tp.checkpoint.parts import is_adapters, whole_tensors, without_adapters
from fabric_tp.checkpoint.rows import Rows
from fabric_tp.styles.low_rank_colwise import DOWN, UP
from fabric_tp.styles.low_rank_fused import LowRankFused
from fabric_tp.wrapping import unwrapped

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@torch.no_grad()
def save(model: nn.Module, directory: str | Path, *, base: str | Path | None = None) -> None:
    """Write the adapters for ``peft.PeftModel.from_pretrained(transformers_model, directory)``.

    All ranks must call it; the first writes. Where litgpt has an adapter for each of some layers that are one layer in
    Transformers (queries, keys and values; a gate and what it lets through), that layer's adapter has their ranks
    together, and in its B the columns of each are zero but for its own rows.

    Args:
        model: A parallelized ``litgpt.lora.GPT``, with or without Fabric around it. Merged or not: the same is written.
        directory: Where to. It appears, or takes the place of an older one, when it is complete.
        base: Where Transformers finds the model that the adapters are for, for its config.

    Raises:
        ValueError: The model has no adapters, or some on layers that Transformers has no linear layer for (experts).

    Example::

        fabric_tp.checkpoint.peft.save(model, "out/peft", base="meta-llama/Llama-3.2-1B")
    """
    adapters = _gathered(unwrapped(model))
    if not adapters:
        raise ValueError("The model has no low-rank adapters to save: it is no litgpt.lora.GPT, or its lora_r is 0.")
    layers = dict(_layers(unwrapped(model), adapters))
    first = not dist.is_initialized() or dist.get_rank() == 0
    barrier = dist.barrier if dist.is_initialized() else _nothing
    with replacing(Path(directory), moves=first, barrier=barrier) as unfinished:
        if first:
            unfinished.mkdir()
            tensors = {
                f"base_model.model.{name}.{matrix}.weight": tensor.contiguous()
                for name, layer in layers.items()
                for matrix, tensor in zip((DOWN, UP), layer, strict=True)
            }
            save_file(tensors, unfinished / WEIGHTS, {"format": "pt"})
            some = next(iter(adapters.values()))
            config = _config({name: len(layer.down) for name, layer in layers.items()}, some, base)
            (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


class _Adapter(NamedTuple):
    """What is added to some rows of a weight of litgpt's: ``up @ down``, times ``alpha / r``."""

    down: Tensor
    """``(r, h)``."""
    up: Tensor
    """``(rows, r)``."""
    first: int
    """Of the rows."""
    alpha: float
    dropout: float

    @property
    def r(self) -> int:
        return len(self.down)


class _Layer(NamedTuple):
    """The adapter of one of Transformers' linear layers."""

    down: Tensor
    up: Tensor


def _gathered(model: nn.Module) -> dict[tuple[str, int], _Adapter]:
    """Of each weight, by its name without adapters, the one or more that it has; all ranks must call this."""
    wholes, adapters = whole_tensors(model), dict[tuple[str, int], _Adapter]()
    for path in dict.fromkeys(name.rpartition(".")[0] for name in wholes if is_adapters(name)):
        module: Any = model.get_submodule(path)
        down, up = (wholes[f"{path}.{matrix}"].gather().cpu() for matrix in (DOWN, UP))
        first, done = 0, 0
        for part, rows in _parts(module, len(up)):
            if part is not None:
                index = len([key for key in adapters if key[0] == path])
                own = down[index * module.r : (index + 1) * module.r], up[done : done + rows]
                dropout = getattr(module.lora_dropout, "p", 0.0)
                adapters[path, index] = _Adapter(*own, first, module.lora_alpha, dropout)
                done += rows
            first += rows
    return adapters


def _parts(module: Any, rows: int) -> Iterator[tuple[str | None, int]]:
    """The parts of a layer's rows in their order, None for one without an adapter, and how many rows each has."""
    style = module.parallelized.style
    if not isinstance(style, LowRankFused):
        yield "", rows
        return
    for part, count in style.base.parts.items():
        yield part if part in style.changed else None, count


def _layers(model: nn.Module, adapters: dict[tuple[str, int], _Adapter]) -> Iterator[tuple[str, _Layer]]:
    names, rows = hub_names(model), Rows()
    shapes = {name: whole.shape for name, whole in without_adapters(whole_tensors(model)).items()}
    hub: dict[str, Tensor] = {}
    for group in grouped(shapes):
        hub |= names.to_hub({name: rows.number(name, shapes[name]) for name in group})
    for name, numbers in hub.items():
        pieces = [piece for run in rows.runs(numbers) for piece in _pieces(run, adapters)]
        if not pieces:
            continue
        if numbers.dim() > 1 or re.search(r"\.experts\.\d+\.", name):
            raise ValueError(
                f"{name} is of an expert. Transformers keeps the experts of a layer in one parameter, for which PEFT"
                " has no adapter that is made of litgpt's. Merge it: fabric_tp.checkpoint.litgpt.merge_adapters."
            )
        keys = list(dict.fromkeys(key for key, _, _ in pieces))
        down = torch.cat([adapters[key].down for key in keys])
        up = down.new_zeros(len(numbers), len(down))
        for key, to, values in pieces:
            column = keys.index(key) * adapters[key].r
            up[to : to + len(values), column : column + adapters[key].r] = values
        yield name.removesuffix(".weight"), _Layer(down, up)


def _pieces(run: Any, adapters: dict[tuple[str, int], _Adapter]) -> Iterator[tuple[tuple[str, int], int, Tensor]]:
    """Of a run of a weight's rows, those that an adapter changes: which one, where they go, and its rows of B."""
    for key, adapter in adapters.items():
        if f"{key[0]}.weight" != run.name:
            continue
        start, end = max(run.first, adapter.first), min(run.first + run.length, adapter.first + len(adapter.up))
        if start < end:
            yield key, run.to + start - run.first, adapter.up[start - adapter.first : end - adapter.first]


def _config(ranks: dict[str, int], adapter: _Adapter, base: str | Path | None) -> dict[str, Any]:
    """What PEFT's ``LoraConfig`` reads; the same layer has the same rank in all blocks."""
    kinds = {re.split(r"\.\d+\.", name)[-1]: rank for name, rank in ranks.items()}
    larger = {kind: rank for kind, rank in kinds.items() if rank != adapter.r}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "target_modules": sorted(kinds),
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "rank_pattern": larger,
        "alpha_pattern": {kind: adapter.alpha * rank / adapter.r for kind, rank in larger.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _nothing() -> None:
    pass
