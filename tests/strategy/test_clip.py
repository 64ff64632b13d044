"""Clipping of any mix of tensors and DTensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fabric_tp.strategy.clip import clip_grad_norm
from fabric_tp.testing.ranks import mesh as mesh_on_ranks
from tests.fabric import on_ranks
from tests.models import build
from tests.strategy.training import gradients, step_loss


class Mixed(nn.Module):
    """Parameters of every kind, with the gradient that the test gives them."""

    def __init__(self, mesh) -> None:
        super().__init__()
        tp = mesh["tensor_parallel"]
        places = {"split": [Shard(0)], "same": [Replicate()], "other": [Shard(1)]}
        for name, place in places.items():
            self.register_parameter(name, nn.Parameter(distribute(full(name), tp, place)))
        self.plain = nn.Parameter(full("plain"))
        self.fsdp = nn.Module()
        self.fsdp.weight = nn.Parameter(distribute(full("fsdp"), tp, [Shard(0)]))
        fully_shard(self.fsdp, mesh=mesh["data_parallel"])


def full(name: str) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(len(name) + ord(name[0])))


def distribute(whole: Tensor, mesh, places) -> DTensor:
    local = whole
    for dim, place in enumerate(places):
        if isinstance(place, Shard):
            local = local.chunk(mesh.size(dim), place.dim)[mesh.get_local_rank(dim)]
    return DTensor.from_local(local.clone(), mesh, places, run_check=False)


def clip_mixed(sizes: tuple[int, int], norm_type: float, ours: bool) -> dict[str, Tensor]:
    mesh = mesh_on_ranks(*sizes)
    model = Mixed(mesh)
    for name, parameter in model.named_parameters():
        grad = parameter.detach().clone()
        if name == "same" and isinstance(grad, DTensor) and mesh["tensor_parallel"].size() > 1:
            first = mesh["tensor_parallel"].get_local_rank() == 0
            grad = DTensor.from_local(grad.to_local() * first, grad.device_mesh, [Partial()], run_check=False)
        parameter.grad = grad
    if ours:
        norm = clip_grad_norm(model.parameters(), mesh, max_norm=1.0, norm_type=norm_type)
    else:
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type)
    return {"norm": norm, **gradients(model)}


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_norm_of_any_mix(pool, sizes, norm_type) -> None:
    wholes = {name: full(name) for name in ("split", "same", "other", "plain", "fsdp")}
    expected = torch.linalg.vector_norm(torch.stack([w.flatten() for w in wholes.values()]), norm_type)
    found = pool(sizes[0] * sizes[1])(clip_mixed, sizes, norm_type, True)
    assert torch.allclose(found.pop("norm"), expected, rtol=1e-6)
    for name, whole in wholes.items():
        clipped = found[name if name != "fsdp" else "fsdp.weight"]
        assert torch.allclose(clipped, whole / expected, rtol=1e-5), name


def test_mix_breaks_torchs_own(pool) -> None:
    with pytest.raises(AssertionError, match="DTensor"):
        pool(4)(clip_mixed, (2, 2), 2.0, False)


def clip_values(sizes: tuple[int, int]) -> tuple[dict[str, Tensor], float]:
    with on_ranks(sizes) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1))
        fabric.backward(step_loss(fabric, model))
        largest = max(float(g.abs().max()) for g in gradients(model).values())
        fabric.clip_gradients(model, optimizer, clip_val=largest / 3)
        return gradients(model), largest / 3


def test_value_clipping(pool) -> None:
    expected, limit = pool(1)(clip_values, (1, 1))
    found, _ = pool(4)(clip_values, (2, 2))
    assert max(float(g.abs().max()) for g in expected.values()) == pytest.approx(limit)
    assert all(torch.allclose(found[name], g, atol=1e-6) for name, g in expected.items())


def nonfinite(bad_rank: int, error_if_nonfinite: bool) -> float:
    with on_ranks((1, 2)) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1))
        fabric.backward(step_loss(fabric, model))
        if fabric.global_rank == bad_rank:
            model.transformer.h[1].mlp.fc_1.weight.grad.to_local()[0, 0] = float("nan")
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=error_if_nonfinite)
        return float(norm)  # type: ignore[arg-type]


def test_nonfinite_gradient_is_named(pool) -> None:
    with pytest.raises(AssertionError, match=r"RuntimeError: .* that of transformer\.h\.1\.mlp\.fc_1\.weight"):
        pool(2)(nonfinite, 1, True)
    norm = pool(2)(nonfinite, 1, False)
    assert norm != norm
