"""What is refused before anything is sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

import fabric_tp
from fabric_tp.plan import resolve
from fabric_tp.styles import Colwise, Heads, Replicated, Rowwise, SharedHeads, VocabParallelEmbedding
from fabric_tp.testing.ranks import mesh
from tests.models import VOCABULARY, FeedForward, build


def assert_refused(*messages: str, model: nn.Module, size: int, parallelize: fabric_tp.Parallelize) -> None:
    """With all these messages, as patterns, in the error."""
    with pytest.raises(ValueError) as error:
        parallelize.plan(model, tensor_parallel_size=size)
    assert all(message in str(error.value) for message in messages), str(error.value)


def test_query_heads_need_not_be_divisible() -> None:
    plan = fabric_tp.llama().plan(build("llama"), tensor_parallel_size=16)
    assert {name: style.heads for name, style in plan.items() if getattr(style, "heads", None)} == dict.fromkeys(
        ["layers.*.attention", *(f"layers.*.attention.w{name}" for name in "qkvo")], Heads(8, 4)
    )


def test_features_of_other_heads_are_refused() -> None:
    plan: dict[str, ParallelStyle] = {"w1": Colwise(heads=Heads(5, 5)), "w2": Rowwise(heads=Heads(5, 5))}
    message = r"weight\.shape\[0\]=128 of w1 are not the features of 5 heads\."
    with pytest.raises(ValueError, match=message):
        fabric_tp.from_plan(plan).check(FeedForward(64, 128), tensor_parallel_size=2)


def test_key_and_value_heads_are_shared_by_more_ranks() -> None:
    """They are never a reason to refuse: each rank uses its part of the whole projections."""
    plan = fabric_tp.llama().plan(build("llama"), tensor_parallel_size=8)
    names = [f"layers.*.attention.w{name}" for name in "qkv"]
    assert [type(plan[name]) for name in names] == [Colwise, SharedHeads, SharedHeads]


def test_width_not_divisible() -> None:
    model = FeedForward(8, 30)
    messages = ("tensor_parallel_size=4", "weight.shape[0]=30", "w1", "are 1, 2, 3, 5, 6, 10, 15, 30.")
    assert_refused(*messages, model=model, size=4, parallelize=fabric_tp.feed_forward())


@pytest.mark.parametrize("size", [0, -2])
def test_no_ranks(size) -> None:
    messages = (f"tensor_parallel_size={size} must be at least 1",)
    assert_refused(*messages, model=build("Llama-3-8B"), size=size, parallelize=fabric_tp.litgpt())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sizes_that_work(size) -> None:
    fabric_tp.litgpt().check(build("Llama-3-8B"), tensor_parallel_size=size)


def test_key_that_matches_nothing() -> None:
    plan = {"w1": Colwise(), "w2": Rowwise(), "w3": Colwise(), "layers.*.w4": Colwise()}
    messages = ("['layers.*.w4'] match no module", "w1, w2, w3")
    assert_refused(*messages, model=build("feed_forward"), size=2, parallelize=fabric_tp.from_plan(plan))


def test_star_is_one_part_of_a_name() -> None:
    plan = {"*": Replicated()}
    messages = ("0.w1.weight, 0.w2.weight, 0.w3.weight",)
    assert_refused(*messages, model=nn.Sequential(FeedForward(4, 4)), size=2, parallelize=fabric_tp.from_plan(plan))


def test_uncovered_parameter() -> None:
    plan = {"w1": Colwise(), "w2": Rowwise()}
    messages = ("covers the parameters w3.weight.", "fabric_tp.styles.Replicated()")
    assert_refused(*messages, model=build("feed_forward"), size=2, parallelize=fabric_tp.from_plan(plan))


def test_uncovered_parameter_of_a_known_architecture() -> None:
    model: Any = build("Llama-3-8B")
    model.transformer.h[1].attn.scale = nn.Parameter(torch.ones(1))
    assert_refused("transformer.h.1.attn.scale", model=model, size=2, parallelize=fabric_tp.litgpt())


def test_module_of_two_styles() -> None:
    plan = {"*": Replicated(), "w2": Rowwise()}
    messages = ("'*'", "'w2'", "both")
    assert_refused(*messages, model=build("feed_forward"), size=2, parallelize=fabric_tp.from_plan(plan))


@pytest.mark.parametrize("style", [Rowwise(), VocabParallelEmbedding()], ids=repr)
def test_style_of_another_kind_of_module(style) -> None:
    messages = (f"0: {type(style).__name__} takes a torch.nn.", "this is a LayerNorm")
    model = nn.Sequential(nn.LayerNorm(4))
    assert_refused(*messages, model=model, size=2, parallelize=fabric_tp.from_plan({"0": style}))


def test_another_architecture_than_asked_for() -> None:
    messages = ("is a Llama and not litgpt.GPT", "fabric_tp.auto()", "fabric_tp.from_plan()")
    assert_refused(*messages, model=build("llama"), size=2, parallelize=fabric_tp.litgpt())


def test_unknown_architecture() -> None:
    messages = ("this Linear", "litgpt: litgpt.GPT", "llama: ", "feed_forward: ", "fabric_tp.from_plan(plan)")
    assert_refused(*messages, model=nn.Linear(4, 4), size=2, parallelize=fabric_tp.auto())


@pytest.mark.parametrize("factory", ["litgpt", "llama", "feed_forward", "auto"])
@pytest.mark.parametrize(
    ("option", "value", "works"),
    [
        ("activation_checkpointing", "some", "'none', 'selective', 'full'"),
        ("mixed_precision", "fp8", "None, 'bf16-mixed'"),
    ],
)
def test_option_values(factory, option, value, works) -> None:
    with pytest.raises(ValueError, match=f"{option}='{value}' is not known; it must be one of {works}"):
        getattr(fabric_tp, factory)(**{option: value})


def refuses_tokens(token: int) -> None:
    model = fabric_tp.litgpt()(build("Llama-3-8B"), mesh(1, 2))
    with pytest.raises(ValueError, match=rf"must lie in \[0, {VOCABULARY}\), but range from {min(token, 0)} to"):
        model(torch.tensor([[0, token]]))


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_token_out_of_range(pool, token) -> None:
    pool(2)(refuses_tokens, token)


def refuses_mesh() -> None:
    model = build("Llama-3-8B")
    with pytest.raises(ValueError, match=r"dimensions \('dp',\) and none called 'tensor_parallel'.*init_device_mesh"):
        fabric_tp.litgpt()(model, init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)))


def test_mesh_without_tensor_parallel(pool) -> None:
    pool(1)(refuses_mesh)


def refuses_blocks() -> None:
    plan = {"w1": Colwise(), "w2": Rowwise(), "w3": Colwise()}
    with pytest.raises(ValueError, match="blocks='layers' is not a module of the model"):
        fabric_tp.from_plan(plan, blocks="layers")(build("feed_forward"), mesh(1, 1))


def test_blocks_that_are_not_there(pool) -> None:
    pool(1)(refuses_blocks)


def refuses_before_sharding() -> None:
    model = build("Llama-3-8B")
    plan: dict[str, ParallelStyle] = dict(fabric_tp.litgpt().plan(model, tensor_parallel_size=2))
    del plan["lm_head"]
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        fabric_tp.from_plan(plan)(model, mesh(1, 2))
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_refuses_before_sharding(pool) -> None:
    pool(2)(refuses_before_sharding)


def test_all_but_the_star_stands_for_itself() -> None:
    """fnmatch's brackets and question marks do not: keys of a ModuleDict may have them."""
    model = nn.ModuleDict({"w[0]": nn.Linear(8, 8), "w0": nn.Linear(8, 8), "w?": nn.Linear(8, 8)})
    plan = dict.fromkeys(("w[0]", "w?", "w*"), Replicated())
    matched = {pattern: [name for name, _ in found] for pattern, found in resolve(plan, model)}
    assert matched == {"w[0]": ["w[0]"], "w?": ["w?"], "w*": ["w[0]", "w0", "w?"]}
