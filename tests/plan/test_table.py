"""What a plan looks like, for people."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from litgpt import GPT, Config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fabric_tp
from tests.models import build


def on_meta(name: str, **overrides: object) -> GPT:
    with torch.device("meta"):
        return GPT(Config.from_name(name, **overrides))


def row(text: str, *cells: str) -> list[str]:
    """The columns of the only row that starts with these."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    found = [cells_ for cells_ in rows if cells_[: len(cells)] == list(cells)]
    assert len(found) == 1, (cells, text)
    return found[0]


AGAIN = "reduce-scatter + all-gather again"


@pytest.fixture(scope="module")
def llama3_8b_at_8() -> str:
    return fabric_tp.litgpt().explain(on_meta("Llama-3-8B"), tensor_parallel_size=8, data_parallel_size=4)


@pytest.mark.parametrize(
    "cells",
    [
        ("transformer.wte", "VocabParallelEmbedding", "weight", "128256 x 4096", "16032 x 4096", "reduce-scatter"),
        ("transformer.h.*.norm_1 x 32", "Replicated", "weight", "4096", "4096", "", "(in the bucket)"),
        ("transformer.h.*.attn x 32", "ShardHeads", "", "", "", "all-gather", AGAIN),
        ("transformer.h.*.attn.qkv x 32", "FusedColwise", "q.weight", "4096 x 4096", "512 x 4096", "", ""),
        ("", "", "k.weight", "1024 x 4096", "128 x 4096"),
        ("", "", "v.weight", "1024 x 4096", "128 x 4096"),
        ("transformer.h.*.attn.proj x 32", "Rowwise", "weight", "4096 x 4096", "4096 x 512", "reduce-scatter"),
        ("transformer.h.*.mlp x 32", "PrepareInput", "", "", "", "all-gather", AGAIN),
        ("transformer.h.*.mlp.fc_1 x 32", "Colwise", "weight", "14336 x 4096", "1792 x 4096", "", ""),
        ("transformer.h.*.mlp.fc_2 x 32", "Colwise", "weight", "14336 x 4096", "1792 x 4096", "", ""),
        ("transformer.h.*.mlp.proj x 32", "Rowwise", "weight", "4096 x 14336", "4096 x 1792", "reduce-scatter"),
        ("transformer.ln_f", "Replicated", "weight", "4096", "4096", "", "(in the bucket)"),
        ("lm_head", "LMHead", "weight", "128256 x 4096", "16032 x 4096", "all-gather", AGAIN),
    ],
    ids=lambda cells: cells[0] or cells[2],
)
def test_explain_row(llama3_8b_at_8, cells) -> None:
    assert tuple(row(llama3_8b_at_8, *cells)[: len(cells)]) == cells


def test_explain_totals(llama3_8b_at_8) -> None:
    per_rank = (8_030_261_248 - 65 * 4096) // 8 + 65 * 4096
    assert f"8,030,261,248 parameters, about {per_rank // 4:,} of them on each rank" in llama3_8b_at_8


def test_explain_without_sequence_parallel() -> None:
    text = fabric_tp.litgpt(sequence_parallel=False, loss_parallel=False).explain(
        on_meta("Llama-3-8B"), tensor_parallel_size=8
    )
    assert row(text, "transformer.h.*.attn x 32")[5:] == ["", "all-reduce"]
    assert row(text, "transformer.h.*.attn.proj x 32")[5:] == ["all-reduce", ""]
    assert row(text, "lm_head")[5:] == ["all-gather", "all-reduce"]


def test_explain_counts_tied_parameters_once() -> None:
    model: Any = on_meta("Llama-3-8B")
    model.transformer.wte.weight = model.lm_head.weight
    text = fabric_tp.litgpt().explain(model, tensor_parallel_size=8)
    assert f"{8_030_261_248 - 128256 * 4096:,} parameters" in text


class OnlyMeta(TorchDispatchMode):
    """Fails on any tensor that takes memory."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        assert all(leaf.is_meta for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), function
        return output


def test_explain_needs_no_processes_and_no_memory() -> None:
    model = on_meta("Llama-3-8B")
    assert not dist.is_initialized()
    with OnlyMeta():
        fabric_tp.litgpt().explain(model, tensor_parallel_size=8)


def test_explain_leaves_the_model_alone() -> None:
    model = on_meta("Llama-3-8B", n_layer=2)
    before = [(name, type(module)) for name, module in model.named_modules()]
    fabric_tp.litgpt().explain(model, tensor_parallel_size=8)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("sizes", [(0, 1), (2, 0), (2, -1)])
def test_explain_of_no_ranks(sizes) -> None:
    tensor_parallel_size, data_parallel_size = sizes
    with pytest.raises(ValueError, match=rf"parallel_size={min(sizes)} must be at least 1"):
        fabric_tp.litgpt().explain(
            build("Llama-3-8B"), tensor_parallel_size=tensor_parallel_size, data_parallel_size=data_parallel_size
        )
