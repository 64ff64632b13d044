"""Experts whose weights lie in parameters of three dimensions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fabric_tp.autograd import concatenation
from fabric_tp.styles import StackedExperts
from tests.styles.table import SIZES, Example, build, check, name_of, rows

EXPERTS = 6
SPLIT = {"gate_up_proj": 1, "down_proj": 2}
HIDDEN, WIDTH = SIZES["f"], SIZES["h"]


class Mixture(nn.Module):
    """Every token passes every expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))

    def forward(self, hidden: Tensor) -> Tensor:
        y = torch.zeros_like(hidden)
        for gate_up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            gate, up = F.linear(hidden, gate_up).chunk(2, -1)
            y = y + F.linear(F.silu(gate) * up, down)
        return y


class Interleaved(nn.Module):
    """Inputs before outputs, each gate beside its up, and biases; a token passes every expert with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * HIDDEN))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        y = torch.zeros_like(hidden)
        for i in range(EXPERTS):
            gate_up = hidden @ self.gate_up_proj[i] + self.gate_up_proj_bias[i]
            inner = F.silu(gate_up[..., ::2]) * gate_up[..., 1::2]
            y = y + hidden.mean(-1, keepdim=True) * (inner @ self.down_proj[i] + self.down_proj_bias[i])
        return y


EXAMPLE = Example(
    StackedExperts,
    Mixture,
    {"split": SPLIT, "parts": ("gate", "up"), "fused": ("gate_up_proj",)},
    sizes={"e": EXPERTS},
)
INTERLEAVED = Example(
    StackedExperts,
    Interleaved,
    {"split": {"gate_up_proj": 2, "gate_up_proj_bias": 1, "down_proj": 1}, "once": ("down_proj_bias",)},
    sizes={"e": EXPERTS},
)


@pytest.mark.parametrize("row", rows(StackedExperts), ids=name_of)
def test_table(pool, row) -> None:
    pool(2)(check, EXAMPLE, row)


def test_other_layout_and_biases(pool) -> None:
    row = {"x": "(b, s, h)", "y": "(b, s, h) partial", "gate_up_proj": "(e, h, 2 * f/t)", "down_proj": "(e, f/t, h)"}
    row |= {"gate_up_proj_bias": "(e, 2 * f/t)", "down_proj_bias": "(e, h)", "forward": "", "backward": ""}
    pool(2)(check, INTERLEAVED, {**row, "gradient": "partial: x, down_proj_bias"})


def test_notices_a_contiguous_split_of_gate_and_up(pool) -> None:
    (row,) = rows(StackedExperts)
    with pytest.raises(AssertionError, match=r"same\(total, whole"):
        pool(2)(check, replace(EXAMPLE, arguments={"split": SPLIT}), row)


def kept_of_the_whole() -> tuple[int, int, int]:
    """Bytes of the concatenated weight before and after the backward has come to it, and of all of it."""
    _, _, model = build(EXAMPLE, EXAMPLE.style_of({}), 2)
    held: list[Tensor] = []
    concatenate = concatenation.Concatenation.free_until_backward

    def spy(self: concatenation.Concatenation, output: object) -> None:
        held.append(self.whole)
        concatenate(self, output)

    concatenation.Concatenation.free_until_backward = spy  # type: ignore[method-assign]
    try:
        y = model["it"](torch.randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=True))
    finally:
        concatenation.Concatenation.free_until_backward = concatenate  # type: ignore[method-assign]
    (whole,) = held
    before = whole.untyped_storage().nbytes()
    y.sum().backward()
    return before, whole.untyped_storage().nbytes(), whole.numel() * whole.element_size()


def test_the_backward_keeps_no_copy_of_the_weights(pool) -> None:
    before, after, whole = pool(2)(kept_of_the_whole)
    assert before == 0
    assert after == whole


def gradients_of_a_retained_graph() -> list[float]:
    _, _, model = build(EXAMPLE, EXAMPLE.style_of({}), 2)
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = model["it"](x).square().sum()
    sums = []
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
        sums.append(float(grad.abs().sum()))
    return sums


def test_a_graph_may_be_used_twice(pool) -> None:
    first, second = pool(2)(gradients_of_a_retained_graph)
    assert first == second > 0


def gradients_with_and_without_checkpoint() -> list[Tensor]:
    """What comes after the experts keeps something too, so that they are computed again to their end."""
    _, _, model = build(EXAMPLE, EXAMPLE.style_of({}), 2)
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        return model["it"](x).sin().square().sum()

    losses = [forward(x), checkpoint(forward, x, use_reentrant=False)]
    return [torch.autograd.grad(loss, x)[0] for loss in losses]


def test_activation_checkpointing(pool) -> None:
    without, with_checkpoint = pool(2)(gradients_with_and_without_checkpoint)
    torch.testing.assert_close(with_checkpoint, without)


def test_parameters_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="StackedExperts needs a parameter 'w1'; the module has gate_up_proj, down_pr"):
        StackedExperts({"w1": 1}).validate(Mixture())


def test_sizes_that_cannot_be_divided() -> None:
    style = StackedExperts(SPLIT, parts=("gate", "up"), fused=("gate_up_proj",))
    assert style.divided(Mixture()) == {"gate_up_proj.shape[1]": HIDDEN, "down_proj.shape[2]": HIDDEN}
