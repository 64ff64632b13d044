"""Linear layers behind a common input, on one device and on ranks, and what their backward does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fabric_tp.autograd.collectives import Group
from fabric_tp.autograd.linear import linear
from fabric_tp.autograd.norms import rms_norm
from fabric_tp.autograd.recompute import producer_of
from fabric_tp.autograd.shared_input import enter
from fabric_tp.testing.ranks import mesh

HIDDEN, WIDTH, LENGTH = 6, 8, 4


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


class Layers:
    """The input of two layers and their weights.

    Args:
        group: Of whose ranks this holds one's part; None for one device.
        sequence: The input is gathered.
        normed: It is the output of a norm.
    """

    def __init__(
        self,
        group: Group | None,
        *,
        sequence: bool = True,
        normed: bool = False,
        batch: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        x = random(batch, LENGTH, WIDTH, seed=0, dtype=dtype)
        weights = [random(2 * HIDDEN, WIDTH, seed=seed, dtype=dtype) for seed in (2, 3)]
        if group:
            x = x.detach().chunk(group.size if sequence else 1, 1)[group.rank if sequence else 0].requires_grad_()
            weights = [w.detach().chunk(group.size)[group.rank].requires_grad_() for w in weights]
        self.group, self.sequence, self.x, self.weights = group, sequence, x, weights
        before = rms_norm(x, random(WIDTH, seed=1, dtype=dtype).detach(), 1e-5) if normed else x * 1
        self.entered = enter(before, group, sequence=sequence) if group else before * 1  # which nothing can recompute

    def gradients(self) -> list[Tensor]:
        """Of input and weights."""
        return [t.grad if t.grad is not None else torch.zeros_like(t) for t in (self.x, *self.weights)]

    def part(self, whole: list[Tensor]) -> list[Tensor]:
        """This rank's part of one device's gradients."""
        assert self.group
        x = whole[0].chunk(self.group.size, 1)[self.group.rank] if self.sequence else whole[0]
        return [x, *(grad.chunk(self.group.size)[self.group.rank] for grad in whole[1:])]


Use = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the input and two weights to a loss."""


def both(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return linear(x, [first]).square().sum() + linear(x, [second]).sin().sum()


def parts(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return linear(x, [first, second]).square().sum()


def one_unused(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    linear(x, [second])
    return linear(x, [first]).square().sum()


def one_without_grad(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    with torch.no_grad():
        scale = linear(x, [second]).mean(-1, keepdim=True)
    return (linear(x, [first]).square() * (scale - scale + 2)).sum()


def one_twice(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return both(x, first, second) + linear(x, [first]).exp().sum()


def something_else_too(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return both(x, first, second) + (x.square() * first.sum(0)).sum()


def one_frozen(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return both(x, first, second.detach())


USES = [both, parts, one_unused, one_without_grad, one_twice, something_else_too, one_frozen]


def view(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return both(x.flatten(0, 1), first, second)


def changed_in_place(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Even after a layer took it: what is gathered again does not change, while a plain layer keeps ``x`` itself."""
    before = linear(x, [first]).square().sum()
    x = x * 2 if producer_of(x) is None else x.mul_(2)
    return before + linear(x, [second]).sin().sum()


def changed_without_grad(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(2)
    return both(x, first, second)


def behind_a_hook(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert producer_of(x) is None
            return linear(x, [first])

    layer = Layer()
    layer.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],))
    return layer(x).square().sum() + linear(x, [second]).sin().sum()


IN_BETWEEN = [view, changed_in_place, changed_without_grad, behind_a_hook]
"""Those with a node between the input and a layer."""


def backward(use: Use, layers: Layers, times: int = 1) -> None:
    loss = use(layers.entered, *layers.weights)
    for _ in range(times - 1):
        loss.backward(retain_graph=True)
    loss.backward()


Run = Callable[[Layers], None]
"""Forward and backward, or what else is done with the layers."""


def compare(run: Run, tolerance: float = 1e-12, **options: Any) -> None:
    """The gradients of one device, after ``run``; on each rank of a pool."""
    alone, parallel = Layers(None, **options), Layers(Group.of(mesh(1, 2)["tensor_parallel"]), **options)
    for layers in (alone, parallel):
        run(layers)
    expected = parallel.part(alone.gradients())
    assert all(bool(grad.abs().sum()) for grad in expected[:2])
    for one, other in zip(parallel.gradients(), expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=max(tolerance, 1e-6), atol=tolerance)


class Operations(TorchDispatchMode):
    """Records matrix products and collectives, and their results that are still in memory."""

    NAMES = {  # noqa: RUF012
        "mm": "product",
        "addmm_": "product",
        "all_gather_into_tensor": "gather",
        "_allgather_base_": "gather",  # on the CPU
        "reduce_scatter_tensor": "sum",
        "alltoall_base_": "sum",  # on the CPU
        "all_reduce": "sum",
        "wait_tensor": "wait",
    }

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inputs: list[Tensor] = []
        """Of the sums, without values."""
        self.alive: list[set[int]] = []
        """Before each operation: the numbers of those whose results are in memory."""
        self._results: list[StorageWeakRef] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self.NAMES.get(operation.__name__.split(".")[0])
        if name:
            self.alive.append({number for number, each in enumerate(self._results) if not each.expired()})
        if name == "sum":
            self.inputs.append(args[operation.__name__.startswith("alltoall")].to("meta"))
        result = operation(*args, **(kwargs or {}))
        if name:
            self.names.append(name)
            made = result if isinstance(result, Tensor) else args[0]
            self._results.append(StorageWeakRef(made.untyped_storage()))
        return result
