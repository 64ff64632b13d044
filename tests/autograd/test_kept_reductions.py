"""Activation checkpointing: what runs again in the backward of a block, and what does not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from litgpt import GPT
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fabric_tp
from fabric_tp.autograd.kept_reductions import _Keep, kept_reductions, reduction
from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH, litgpt_config


class Products(TorchDispatchMode):
    """Counts matrix products and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.__name__
        if "mm" in name:
            self.counts["product"] += 1
        elif "scaled_dot_product" in name:
            self.counts["backward" if "backward" in name else "attention"] += 1
        return operation(*args, **(kwargs or {}))


def count(name: str, options: dict[str, Any]) -> dict[str, int]:
    """Per layer, in the backward."""
    counts = []
    for layers in (1, 2):
        model = fabric_tp.litgpt(**options)(GPT(litgpt_config(name, n_layer=layers)), mesh(1, 2))
        logits: Any = model(torch.zeros(1, LENGTH, dtype=torch.int64))
        with Products() as products:
            logits.to_local().sum().backward()
        counts.append(products.counts)
    return dict(counts[1] - counts[0])


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize(
    ("name", "kind", "products", "attentions"),
    [
        ("Llama-3-8B", "none", 2 * 5, 0),
        ("Llama-3-8B", "full", 2 * 5 + 4, 1),  # all but the last of the five products
        ("Llama-3-8B", "selective", 2 * 5 + 3, 0),  # neither of the two before a reduction
        ("pythia-14m", "none", 2 * 4, 0),
        ("pythia-14m", "full", 2 * 4 + 3, 1),
        ("pythia-14m", "selective", 2 * 4 + 2, 0),
    ],
)
def test_runs_again(pool, name, kind, products, attentions, sequence_parallel) -> None:
    options = {"activation_checkpointing": kind, "sequence_parallel": sequence_parallel}
    found = pool(2)(count, name, options)
    assert found == {"product": products, "backward": 1} | ({"attention": attentions} if attentions else {})


def test_keeps_and_takes_in_order() -> None:
    forward, recomputation = kept_reductions()
    x = torch.ones(2, requires_grad=True)
    with forward:
        kept = [reduction(lambda x, n=n: x * n, x) for n in (2, 3)]
    for _ in range(2):  # a graph may be gone through twice
        with recomputation:
            taken = [reduction(_never, x) for _ in kept]
        assert all(torch.equal(one, other) for one, other in zip(taken, kept, strict=True))
        assert all(tensor.requires_grad for tensor in taken)


def _never(x: Tensor) -> Tensor:
    raise AssertionError("computed again")


def test_kept_inputs_pass_gradients_through() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert gradcheck(_Keep.apply, (x,))
    assert gradgradcheck(_Keep.apply, (x,))


def test_outside_of_its_contexts_it_is_the_function() -> None:
    x = torch.ones(2, requires_grad=True)
    y = reduction(lambda x: x * 2, x)
    assert y.grad_fn.next_functions[0][0].variable is x  # type: ignore[union-attr]
    forward, recomputation = kept_reductions()
    with forward:
        reduction(lambda x: x * 2, x)
        reduction(lambda x: x * 2, x.detach())  # needs no backward, and so no recomputation
    with recomputation:
        reduction(_never, x)
        with pytest.raises(AssertionError, match="computed again"):
            reduction(_never, x.detach())
