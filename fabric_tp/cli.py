"""``fabric-tp estimate`` and ``explain``: what a run will need, before it is started; ``convert``: checkpoints."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fabric_tp
from fabric_tp.architectures.litgpt.config import load_config, meta_model, with_adapters
from fabric_tp.checkpoint.conversion import Layout
from fabric_tp.measure.estimation import Estimate, Precision, gib, render
from fabric_tp.measure.fit import cheapest, fit

if TYPE_CHECKING:
    from litgpt import Config

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def estimate(
    model: str,
    *,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    micro_batch_size: int = 1,
    sequence_length: int | None = None,
    precision: Precision = "bf16-true",
    lora: bool = False,
    lora_r: int = 8,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    fit: str | None = None,
    max_tensor_parallel_size: int = 8,
    json: Path | None = None,
    **options: Any,
) -> None:
    """Memory of each rank and bytes on the wire in a training step; needs no GPU.

    Args:
        model: A name that litgpt knows, such as Llama-3-8B, or a checkpoint directory.
        tensor_parallel_size: Ranks over which each layer is split.
        data_parallel_size: Ranks of FSDP2.
        micro_batch_size: Samples of each data-parallel rank.
        sequence_length: Tokens of a sample; as many as the model can take by default.
        precision: As in Fabric; "bf16-mixed" is FSDP2's, with fp32 parameters.
        lora: Train low-rank adapters, and leave the model's weights as they are.
        lora_r: Rank of the adapters.
        lora_query: Whether the attention's queries get an adapter.
        lora_key: Whether its keys get one.
        lora_value: Whether its values get one.
        lora_projection: Whether its output projection gets one.
        lora_mlp: Whether the layers of the MLP, and the router of experts, get one each.
        lora_head: Whether the last layer, to the vocabulary, gets one.
        fit: Memory of a card, such as 80GiB: list the meshes of tensor_parallel_size x data_parallel_size devices,
            and the options, that fit it, cheapest communication first.
        max_tensor_parallel_size: With ``fit``, the devices of one machine.
        json: A file to write the figures to.
        options: Of ``fabric_tp.litgpt``.
    """
    parallelize = fabric_tp.litgpt(mixed_precision=None, **options)
    layers = {"query": lora_query, "key": lora_key, "value": lora_value, "projection": lora_projection}
    layers |= {"mlp": lora_mlp, "head": lora_head}
    config = load_config(model)
    if lora:
        config = with_adapters(config, lora_r=lora_r, **{f"lora_{layer}": given for layer, given in layers.items()})
    shared: dict[str, Any] = {
        "micro_batch_size": micro_batch_size,
        "sequence_length": sequence_length,
        "precision": precision,
    }
    if fit is None:
        shared |= {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
        found = [fabric_tp.estimate(config, parallelize, **shared)]
        print(found[0])
    else:
        found = _fitting(
            config, parallelize, fit, tensor_parallel_size * data_parallel_size, max_tensor_parallel_size, shared
        )
        print(_list(found, fit, tensor_parallel_size * data_parallel_size))
    _write(json, found)


def explain(model: str, *, tensor_parallel_size: int = 1, data_parallel_size: int = 1, **options: Any) -> None:
    """What is split how, and what the ranks say to each other, module by module.

    Args:
        model: A name that litgpt knows, such as Llama-3-8B, or a checkpoint directory.
        tensor_parallel_size: Ranks over which each layer is split.
        data_parallel_size: Ranks of FSDP2.
        options: Of ``fabric_tp.litgpt``.
    """
    sizes = {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
    print(fabric_tp.litgpt(mixed_precision=None, **options).explain(meta_model(load_config(model)), **sizes))


def convert(
    source: Path,
    target: Path,
    *,
    to: Layout,
    like: Path | None = None,
    model_name: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Turn a checkpoint into one of another layout, tensor by tensor; needs no GPU.

    Args:
        source: A directory: litgpt's, with lit_model.pth; the hub's, with safetensors; or a training checkpoint.
        target: The directory to write, which may not exist.
        to: "litgpt" for litgpt's commands, "huggingface" for Transformers, "distributed" for fabric.load on any mesh.
        like: A directory of the same model that has what the source lacks: config and tokenizer.
        model_name: Name that litgpt has for the model, if it is not the directory's.
        dtype: Of the result, such as bfloat16; by default that of the source.
        max_shard_size: Of a file for Transformers.
    """
    options: dict[str, Any] = {"like": like, "model_name": model_name, "dtype": dtype, "max_shard_size": max_shard_size}
    fabric_tp.checkpoint.convert(source, target, to=to, **options)
    print(f"Wrote {target}")


def parse_bytes(text: str) -> int:
    """Bytes of ``"80GiB"``, ``"80 GB"`` or ``"1000"``.

    Raises:
        ValueError: It is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is not an amount of memory; write it as 80GiB, 80GB or in bytes.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _fitting(
    config: Config, parallelize: fabric_tp.Parallelize, card: str, devices: int, largest: int, shared: dict[str, Any]
) -> list[Estimate]:
    ways = fit(
        config, parallelize, memory=parse_bytes(card), devices=devices, max_tensor_parallel_size=largest, **shared
    )
    progress = track(ways, "Trying meshes", transient=True, console=Console(stderr=True))
    return cheapest(progress)


def _list(found: list[Estimate], card: str, devices: int) -> str:
    if not found:
        return f"No mesh of {devices} devices fits {card}. More devices, or fewer tokens to each, are the way out."
    table = Table(title=f"{found[0].model} on {devices} devices of {card}", title_justify="left")
    for heading in ("tensor parallel", "data parallel", "activation checkpointing", "reshard after forward"):
        table.add_column(heading)
    for heading in ("peak, GiB", "GiB sent per step", "bytes sent per token"):
        table.add_column(heading, justify="right")
    for each in found:
        options = each.parallelize
        table.add_row(
            str(each.tensor_parallel_size),
            str(each.data_parallel_size),
            options.activation_checkpointing,
            str(options.reshard_after_forward).lower() if each.data_parallel_size > 1 else "",
            gib(each.memory.peak),
            gib(each.sent()),
            f"{each.sent() / each.tokens:,.0f}",
        )
    return render(table)


def _write(file: Path | None, found: list[Estimate]) -> None:
    if file:
        file.write_text(json.dumps([each.to_dict() for each in found], indent=2) + "\n")


def main() -> None:
    warnings.filterwarnings("ignore")
    try:
        auto_cli([estimate, explain, convert])
    except ValueError as error:  # the user's mistake, which says itself what to do
        sys.exit(f"fabric-tp: {error}")


if __name__ == "__main__":
    main()
