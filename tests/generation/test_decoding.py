"""While it generates, a model keeps what it has seen and talks little; afterwards it is as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fabric_tp
from fabric_tp.generation.decoding import decoding
from fabric_tp.styles.style import LocalModule
from fabric_tp.testing.ranks import mesh
from tests.generation.test_continuation import NEW, PROMPT, generate, greedy, parallelized, prompt
from tests.measure.test_communication import Collectives
from tests.models import VOCABULARY


def state(model: nn.Module) -> dict[str, Any]:
    """All that generation changes."""
    modules = {name: (type(module), module.training, vars(module).keys()) for name, module in model.named_modules()}
    styles = [module.parallelized.style for module in model.modules() if isinstance(module, LocalModule)]
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    return {"modules": modules, "styles": styles, "parameters": parameters, "buffers": [*dict(model.named_buffers())]}


def states(sizes: tuple[int, int], name: str, ends: str) -> None:
    model = parallelized(sizes, name, compile=ends == "compiled").train()
    model.get_submodule(next(name for name, _ in model.named_children())).eval()
    before = state(model)
    stream = fabric_tp.generate_stream(model, prompt(), NEW, temperature=0)
    if ends == "early":
        next(stream)
        stream.close()
    elif ends == "by an error":
        with pytest.raises(ValueError, match="Token indices"):
            list(fabric_tp.generate_stream(model, prompt() + VOCABULARY, NEW))
    else:
        assert len(list(stream)) == NEW
    after = state(model)
    # FSDP2 leaves gathered what a forward that failed has gathered
    excused = {"parameters"} if ends == "by an error" and sizes[0] > 1 else set()
    assert {name for name, value in before.items() if value != after[name]} <= excused


@pytest.mark.swept(lambda p: p["ends"] == "compiled" or p["sizes"] == (2, 2))
@pytest.mark.parametrize("ends", ["by itself", "early", "by an error", "compiled"])
@pytest.mark.parametrize("name", ["Llama-3-8B", "llama"])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_the_model_is_as_before(pool, sizes, name, ends) -> None:
    pool(sizes[0] * sizes[1])(states, sizes, name, ends)


def losses(sizes: tuple[int, int], generates: bool) -> list[float]:
    model = parallelized(sizes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(3):
        loss = fabric_tp.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        if generates:
            fabric_tp.generate(model, prompt(), 2)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.swept(lambda p: p["sizes"] == (2, 2))
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_training_goes_on_as_if_nothing_had_been_generated(pool, sizes) -> None:
    with_and_without = [pool(sizes[0] * sizes[1])(losses, sizes, generates) for generates in (True, False)]
    assert with_and_without[0] == with_and_without[1]


def seen(name: str) -> list[tuple[int, ...]]:
    """The shape of what the model is called with, each time."""
    model, shapes = parallelized((1, 2), name), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    fabric_tp.generate(model, [prompt(), prompt(2)], 4, temperature=0)
    return shapes


def test_each_new_token_costs_one(pool) -> None:
    assert pool(2)(seen, "Llama-3-8B") == [(2, PROMPT), (2, 1), (2, 1), (2, 1)]


def test_without_a_cache_the_whole_sequence_is_computed(pool) -> None:
    assert pool(2)(seen, "llama") == [(2, PROMPT + 4)] * 4


def count(name: str, how: dict[str, Any], **overrides: Any) -> dict[str, int]:
    model = parallelized((1, 2), name)
    tokens = fabric_tp.generate_stream(model, prompt(), NEW, **how)
    next(tokens)
    with Collectives() as collectives:
        next(tokens)
    return collectives.counts


@pytest.mark.parametrize("how", [{"temperature": 0}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_collectives_of_a_token(pool, how) -> None:
    """An all-reduce per attention, MLP and embedding, and a gather to choose."""
    assert pool(2)(count, "Llama-3-8B", {**how, "seed": 1}) == {"AR": 2 * 2 + 1, "AG": 1}


def test_heads_that_ranks_do_not_divide_cost_no_more(pool) -> None:
    """The exchange of rows that completes them is done once."""
    assert pool(2)(count, "SmolLM2-135M", {"temperature": 0}) == {"AR": 2 * 2 + 1, "AG": 1}


def runs_on_plain_tensors() -> bool:
    model = parallelized((1, 2))
    with decoding(model):
        return not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_parameters_are_plain_meanwhile(pool) -> None:
    assert pool(2)(runs_on_plain_tensors)


def forget_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode as it trains: with parts of the sequence, of which the embedding of one token leaves none to a rank."""
    monkeypatch.setattr(fabric_tp.parallelize.parallelize, "set_decoding_styles", lambda plan, model: None)


def count_without_styles() -> dict[str, int]:
    with pytest.MonkeyPatch.context() as patch:
        forget_styles(patch)
        return count("Llama-3-8B", {"temperature": 0})


def test_forgotten_styles_are_noticed(pool) -> None:
    assert set(pool(2)(count_without_styles)) == {"AG", "RS"}


def test_a_plan_of_the_users_decodes_as_it_trains(pool) -> None:
    assert pool(2)(with_own_plan, prompt()) == greedy(prompt())


def with_own_plan(tokens: Tensor) -> list[int]:
    from tests.models import build

    model = build("Llama-3-8B")
    plan = fabric_tp.litgpt().plan(model, tensor_parallel_size=2)
    parallel = fabric_tp.from_plan(plan)(model, mesh(1, 2))
    return fabric_tp.generate(parallel, tokens, NEW, temperature=0).tolist()


def compiled_graphs(new: int) -> tuple[list[int], int]:
    """What is generated, and for how many different inputs something was compiled."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fabric_tp.generation.continuation, "for_each_shape", eagerly_compiled)
        tokens = generate((1, 2), prompt(), {}, temperature=0, compile=True, new=new)
    return tokens, counters["stats"]["unique_graphs"]


def eagerly_compiled(mode: str | None = None) -> Any:
    from fabric_tp.parallelize.compiled import own_forward

    return torch.compile(own_forward, dynamic=False, backend="eager", fullgraph=True)


def test_compiled_once_for_all_positions(pool) -> None:
    few, graphs = pool(2)(compiled_graphs, 2)
    many, same = pool(2)(compiled_graphs, NEW)
    assert graphs == same > 0
    assert many == greedy(prompt())
    assert few == many[: PROMPT + 2]
