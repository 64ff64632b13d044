"""``python -m benchmarks.transformers_plan``: Transformers' own ``tp_plan="auto"`` and fabric_tp on the same models.

Each type of causal language model that has a plan of its own, made small, in fp32, compared with one device: output,
and the gradient of every parameter for a random gradient of the output.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from torch import Tensor, nn

import fabric_tp
from fabric_tp.plan import CannotSplit
from fabric_tp.testing.parity import TOLERANCE, compare, next_token_loss
from fabric_tp.testing.ranks import Ranks, mesh
from fabric_tp.testing.small import LENGTH, VOCABULARY, causal_types, small_causal, small_inputs


def main(tensor_parallel_size: int = 2, only: str = "") -> None:
    """Print a line for each type, and how many are right.

    Args:
        tensor_parallel_size: Ranks that share the model.
        only: Take only types whose name contains this.
    """
    ranks = Ranks(tensor_parallel_size)
    right = {
        "Transformers' output": 0,
        "Transformers' gradients": 0,
        "fabric_tp's output": 0,
        "fabric_tp's gradients": 0,
    }
    number, tokens = 0, torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    print(f"{'':24}{'Transformers':>24}{'fabric_tp':>24}")
    print(f"{'':24}" + 2 * f"{'output':>12}{'gradients':>12}")
    for model_type in (name for name in causal_types() if only in name):
        try:
            model: Any = small_causal(model_type)
            inputs = small_inputs(model, tokens)
            with torch.no_grad():
                model(**inputs) if isinstance(inputs, dict) else model(inputs)
        except Exception:
            continue  # not so simply made
        if not model.tp_plan:
            continue
        number += 1
        theirs, ours = _theirs(ranks, model_type, inputs), _ours(ranks, model_type, inputs)
        for name, off in zip(right, (*theirs[:2], *ours), strict=True):
            right[name] += off <= TOLERANCE
        numbers = "".join(f"{off:12.1e}" for off in (*theirs[:2], *ours))
        print(f"{model_type:24}{numbers}  {theirs[2] if theirs[1] > TOLERANCE else ''}".rstrip(), flush=True)
    ranks.stop()
    print(f"right, of {number}: " + ", ".join(f"{name} {count}" for name, count in right.items()))


def _ours(ranks: Ranks, model_type: str, inputs: Any) -> tuple[float, float]:
    build, sizes = partial(small_causal, model_type), (1, ranks.size)
    for replicate_attention in (False, True):
        parallelize_fn = fabric_tp.auto(replicate_attention=replicate_attention)
        try:
            parallelize_fn.check(build(), tensor_parallel_size=ranks.size)
            found = ranks(compare, build, parallelize_fn, inputs, next_token_loss, sizes, 1)
        except CannotSplit:
            continue
        except (ValueError, AssertionError):
            break
        gradients = [off for name, off in found.items() if name.endswith("for a random one")]
        return found["output"], max(gradients)
    return float("inf"), float("inf")


def _theirs(ranks: Ranks, model_type: str, inputs: Any) -> tuple[float, float, str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return ranks(compare_their_plan, model_type, inputs, Path(folder))
        except AssertionError as error:
            return float("inf"), float("inf"), str(error).strip().splitlines()[-1]


def compare_their_plan(model_type: str, inputs: Any, folder: Path) -> tuple[float, float, str]:
    """How far the output is off, how far the worst gradient, and of how many parameters it is wrong; on every rank.

    A rank's part of a gradient is not looked for: Transformers itself loads the gradients of the undivided model as if
    they were weights, and so divides them in the same way.
    """
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    whole: Any = small_causal(model_type)
    expected = _call(whole, inputs)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * grad).sum().backward()
    model = _divided(whole, folder / "weights")
    output = _call(model, inputs)
    (output * grad).sum().backward()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    gradients = dict(_divided(whole, folder / "gradients").named_parameters())
    off = {
        name: _off(parameter.grad, gradients[name.replace("._bias", ".bias")])  # its row-wise layers rename theirs
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    wrong = sum(each > TOLERANCE for each in off.values())
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, (_off(output, expected), max(off.values()), wrong))
    output_off, gradient_off, worst = (max(values) for values in zip(*every, strict=True))
    return output_off, gradient_off, f"{worst} of {len(off)} gradients of Transformers wrong"


def _divided(model: Any, folder: Path) -> nn.Module:
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    tensor_parallel = mesh(1, dist.get_world_size())["tensor_parallel"]
    return type(model).from_pretrained(folder, tp_plan="auto", device_mesh=tensor_parallel, dtype=torch.float32)


def _call(model: Any, inputs: Any) -> Tensor:
    return (model(**inputs) if isinstance(inputs, dict) else model(inputs)).logits


def _off(value: Tensor | None, expected: Tensor) -> float:
    if value is None or value.shape != expected.shape:
        return float("inf")
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


if __name__ == "__main__":
    auto_cli(main)
