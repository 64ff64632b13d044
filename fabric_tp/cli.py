"""``fabric-tp estimate``, ``plan`` and ``explain``: what a run will need and how fast it will be, before it is started;
``hardware``: what devices can do; ``convert``: checkpoints."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track

import fabric_tp
from fabric_tp.architectures.litgpt.config import load_config, meta_model, with_adapters
from fabric_tp.checkpoint.conversion import Layout
from fabric_tp.measure.calibration import measure_hardware
from fabric_tp.measure.estimation import Estimate, Precision
from fabric_tp.measure.fit import cheapest, fit
from fabric_tp.measure.hardware import load_hardware
from fabric_tp.measure.planning import fastest
from fabric_tp.measure.planning import plan as plan_ways
from fabric_tp.measure.prediction import Prediction, predict
from fabric_tp.measure.report import table_of_estimates, table_of_predictions

if TYPE_CHECKING:
    from litgpt import Config

Way = TypeVar("Way", Estimate, Prediction)

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
    hardware: str | None = None,
    json: Path | None = None,
    **options: Any,
) -> None:
    """Memory of each rank, bytes on the wire and time of a training step; needs no GPU.

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
            and the options, that fit it, cheapest communication first; with ``hardware``, the fastest first.
        max_tensor_parallel_size: With ``fit``, the devices of one machine.
        hardware: Also predict the time: a100, h100, h200, b200, or a file that ``fabric-tp hardware`` wrote.
        json: A file to write the figures to.
        options: Of ``fabric_tp.litgpt``.
    """
    parallelize = fabric_tp.litgpt(mixed_precision=None, **options)
    layers = {"query": lora_query, "key": lora_key, "value": lora_value, "projection": lora_projection}
    layers |= {"mlp": lora_mlp, "head": lora_head}
    devices = tensor_parallel_size * data_parallel_size
    config, known = load_config(model), load_hardware(hardware) if hardware else None
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
    else:
        found = cheapest(_fitting(config, parallelize, fit, devices, max_tensor_parallel_size, shared))
    times = fastest(predict(each, known) for each in found) if known else []
    print(*found, *times, sep="\n") if fit is None else print(_list(found, times, devices, fit))
    _write(json, times or found)


def plan(
    model: str,
    *,
    devices: int,
    hardware: str,
    micro_batch_sizes: Sequence[int] = (1, 2, 4),
    sequence_length: int | None = None,
    precision: Precision = "bf16-true",
    top: int = 10,
    json: Path | None = None,
    **options: Any,
) -> None:
    """The fastest meshes and options with which a model can be trained on so many devices; needs none of them.

    Args:
        model: A name that litgpt knows, such as Llama-3-8B, or a checkpoint directory.
        devices: How many there are; each mesh uses them all.
        hardware: a100, h100, h200, b200, or a file that ``fabric-tp hardware`` wrote. A tenth of its memory stays free.
        micro_batch_sizes: Samples of each data-parallel rank, to be tried on each mesh.
        sequence_length: Tokens of a sample; as many as the model can take by default.
        precision: As in Fabric; "bf16-mixed" is FSDP2's, with fp32 parameters.
        top: How many to list.
        json: A file to write the figures of all to.
        options: Of ``fabric_tp.litgpt``.
    """
    ways = plan_ways(
        load_config(model),
        fabric_tp.litgpt(mixed_precision=None, **options),
        devices=devices,
        hardware=hardware,
        micro_batch_sizes=micro_batch_sizes,
        sequence_length=sequence_length,
        precision=precision,
    )
    found = fastest(_progress(ways))
    print(_list([each.estimate for each in found], found[:top], devices, hardware))
    _write(json, found)


def hardware(file: Path, *, accelerator: str = "auto", devices: int = 2) -> None:
    """Measure what the devices here can do, for ``--hardware``; takes a minute on all of them.

    Args:
        file: The JSON file to write.
        accelerator: As in Fabric: cpu, cuda, auto.
        devices: That a machine has.
    """
    file.write_text(measure_hardware(accelerator, devices).to_json())
    print(f"Wrote {file}")


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


NOTHING_FITS = "No mesh of {devices} devices fits {card}. More devices, or fewer tokens to each, are the way out."


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
) -> Iterable[Estimate]:
    memory = parse_bytes(card)
    return _progress(
        fit(config, parallelize, memory=memory, devices=devices, max_tensor_parallel_size=largest, **shared)
    )


def _list(found: Sequence[Estimate], times: Sequence[Prediction], devices: int, card: str) -> str:
    if not found:
        return NOTHING_FITS.format(devices=devices, card=card)
    return table_of_predictions(times, devices) if times else table_of_estimates(found, f"{devices} devices of {card}")


def _progress(ways: Iterable[Way]) -> Iterable[Way]:
    return track(ways, "Trying meshes", transient=True, console=Console(stderr=True))


def _write(file: Path | None, found: Sequence[Estimate | Prediction]) -> None:
    if file:
        file.write_text(json.dumps([each.to_dict() for each in found], indent=2) + "\n")


def main() -> None:
    warnings.filterwarnings("ignore")
    try:
        auto_cli([estimate, plan, explain, hardware, convert])
    except ValueError as error:  # the user's mistake, which says itself what to do
        sys.exit(f"fabric-tp: {error}")


if __name__ == "__main__":
    main()
