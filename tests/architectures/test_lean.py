"""What keeps less computes the same: outputs to the last bit, gradients up to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from litgpt.model import CausalSelfAttention, GemmaMLP, GptNeoxMLP, LLaMAMLP, RMSNorm, build_rope_cache
from torch import Tensor, nn

from fabric_tp.architectures import LITGPT
from fabric_tp.parallelize.factories import TORCH_LEAN
from fabric_tp.parallelize.lean import make_lean
from tests.models import litgpt_config

LENGTH = 12

TABLES = (TORCH_LEAN, LITGPT.lean)


def norm(name: str) -> nn.Module:
    return {
        "litgpt": lambda: RMSNorm(64, eps=1e-5),
        "Gemma": lambda: RMSNorm(64, eps=1e-5, add_unit_offset=True),
        "torch": lambda: nn.RMSNorm(64, eps=1e-5),
        "without weight": lambda: nn.RMSNorm(64, eps=1e-5, elementwise_affine=False),
        "layer": lambda: nn.LayerNorm(64),
        "layer without weight": lambda: nn.LayerNorm(64, elementwise_affine=False),
        "layer without bias": lambda: nn.LayerNorm(64, bias=False),
    }[name]()


def outputs_and_gradients(module: nn.Module, x: Tensor, *rest: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x * 1, *rest)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


def compare(module: nn.Module, x: Tensor, *rest: Tensor) -> None:
    """As it is and made lean."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    module.to(x.dtype)
    lean = copy.deepcopy(module)
    make_lean(lean, TABLES)
    assert type(lean) is not type(module)
    expected, found = (outputs_and_gradients(each, x, *rest) for each in (module, lean))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    tolerance = 2e-6 if x.dtype == torch.float32 else 2e-2
    assert len(found) == len(expected) == 2 + len(list(module.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def inputs(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    ["litgpt", "Gemma", "torch", "without weight", "layer", "layer without weight", "layer without bias"],
)
def test_norm(name, dtype) -> None:
    compare(norm(name), inputs(dtype, 2, 5, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("mlp", [LLaMAMLP, GemmaMLP, GptNeoxMLP])
def test_mlp(mlp, approximate, dtype) -> None:
    config = litgpt_config("pythia-14m", gelu_approximate=approximate)
    compare(mlp(config), inputs(dtype, 2, 5, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_query_groups": 8},
        {"n_query_groups": 1},
        {"sliding_window_size": 5, "sliding_window_indices": [1, 1]},
        {"attention_logit_softcapping": 5.0},
        {"attention_logit_softcapping": 5.0, "sliding_window_size": 5, "sliding_window_indices": [1, 1]},
        {"attention_scores_scalar": 3},
        {"norm_qk": True},
    ],
    ids=str,
)
def test_attention(options, dtype) -> None:
    config = litgpt_config("Llama-3-8B", **options)
    cos, sin = build_rope_cache(LENGTH, config.rope_n_elem)
    compare(CausalSelfAttention(config, 0), inputs(dtype, 2, LENGTH, 64), cos[None].to(dtype), sin[None].to(dtype))


def test_a_forward_of_somebody_else_stays() -> None:
    class Doubled(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = Doubled(64)
    make_lean(module, TABLES)
    assert type(module) is Doubled


def test_no_class_of_litgpt_changes() -> None:
    before = {cls: cls.forward for cls in (RMSNorm, LLaMAMLP, CausalSelfAttention)}
    make_lean(LLaMAMLP(litgpt_config("Llama-3-8B")), TABLES)
    assert before == {cls: cls.forward for cls in before}
