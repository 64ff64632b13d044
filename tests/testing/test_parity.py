"""check_parity itself: it passes what is right, names what is wrong, and refuses before it starts anything."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import fabric_tp
from fabric_tp.testing import check_parity, parity
from tests.models import FeedForward, build

INPUTS = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0))


def loss(output: Tensor, inputs: Tensor) -> Tensor:
    return (output - inputs).square().mean()


def double_w2(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    model = fabric_tp.feed_forward()(model, mesh)
    with torch.no_grad():
        model.get_parameter("w2.weight")._local_tensor.mul_(2)  # type: ignore[attr-defined]
    return model


def lose_the_gradient_of_w2(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Twice what it should be, as when ranks sum what each of them has whole."""
    model = fabric_tp.feed_forward()(model, mesh)
    model.get_parameter("w2.weight").register_hook(lambda grad: grad * 2)
    return model


def fail_on_one_rank(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    if mesh["tensor_parallel"].get_local_rank() == 1:
        raise RuntimeError("the second rank cannot")
    return fabric_tp.feed_forward()(model, mesh)


@pytest.mark.parametrize("data_parallel_size", [1, 2])
def test_passes(forked_ranks, data_parallel_size) -> None:
    report = check_parity(
        partial(build, "feed_forward"),
        fabric_tp.feed_forward(),
        INPUTS,
        loss,
        tensor_parallel_size=2,
        data_parallel_size=data_parallel_size,
    )
    assert report.equal
    for name in ("output", "loss of step 2", "gradient of w2.weight", "norm of step 0", "w2.weight after 3 steps"):
        assert report.differences[name] <= parity.TOLERANCE
    name, difference = report.worst
    assert difference == max(report.differences.values())
    assert str(report).startswith(f"equal to one device: of {len(report.differences)} tensors the worst is {name}, ")


def test_names_the_worst_parameter(forked_ranks) -> None:
    with pytest.raises(AssertionError, match=r"NOT equal to one device: .* worst is gradient of w2\.weight.*1\.0e\+00"):
        check_parity(partial(build, "feed_forward"), lose_the_gradient_of_w2, INPUTS, loss, steps=1)


def test_wrong_output(forked_ranks) -> None:
    with pytest.raises(AssertionError, match="NOT equal to one device"):
        check_parity(partial(build, "feed_forward"), double_w2, INPUTS, loss, steps=1)


def test_one_rank_fails(forked_ranks) -> None:
    """Its own traceback is shown, and nobody waits for the others, which wait for it."""
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*RuntimeError: the second rank cannot"):
        check_parity(partial(build, "feed_forward"), fail_on_one_rank, INPUTS, loss, steps=1)


def test_refuses_before_it_starts_processes(monkeypatch) -> None:
    def start(size: int) -> None:
        raise AssertionError("started processes")

    monkeypatch.setattr(parity, "Ranks", start)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4 does not divide weight\.shape\[0\]=30"):
        check_parity(partial(FeedForward, 64, 30), fabric_tp.auto(), INPUTS, loss, tensor_parallel_size=4)


def test_not_a_number_is_worst() -> None:
    report = parity.Report({"fine": 0.0, "bad": float("nan"), "off": 1.0})
    assert not report.equal
    assert report.worst[0] == "bad"


def test_gradient_of_nothing_but_rounding() -> None:
    """What is zero but for rounding cannot be compared with itself; what should be zero and is not is still found."""
    zero, rounding, wrong = (torch.full((3,), value) for value in (1e-9, -1e-9, 1e-3))
    assert parity._off(rounding, zero) == 2
    assert parity._off(rounding, zero, largest=1.0) < parity.TOLERANCE
    assert parity._off(wrong, zero, largest=1.0) > 10 * parity.TOLERANCE
