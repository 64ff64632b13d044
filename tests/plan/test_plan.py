"""Plans: what they say, what they refuse, and what they leave alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from litgpt import GPT, Config
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fabric_tp
from fabric_tp.architectures import recognise
from fabric_tp.shards import gather_shards
from fabric_tp.styles import Colwise, LMHead, PrepareInput, Replicated, Rowwise, SharedHeads, VocabParallelEmbedding
from fabric_tp.testing.parity import TOLERANCE, _gradients
from fabric_tp.testing.ranks import mesh
from tests.models import LENGTH, VOCABULARY, FeedForward, Llama, build, litgpt_config

Sizes = tuple[int, int]


def on_meta(name: str, **overrides: object) -> GPT:
    with torch.device("meta"):
        return GPT(Config.from_name(name, **overrides))


# The table.


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


# The plan.

LITGPT_KEYS = {
    "transformer.wte",
    "transformer.h.*.norm_1",
    "transformer.h.*.norm_2",
    "transformer.h.*.attn",
    "transformer.h.*.attn.qkv",
    "transformer.h.*.attn.proj",
    "transformer.h.*.mlp",
    "transformer.h.*.mlp.proj",
    "transformer.ln_f",
    "lm_head",
}
LLAMA_KEYS = {
    "tok_embeddings",
    "layers.*.attention_norm",
    "layers.*.ffn_norm",
    "layers.*.attention",
    *(f"layers.*.attention.{name}" for name in ("wq", "wk", "wv", "wo")),
    "layers.*.feed_forward",
    *(f"layers.*.feed_forward.{name}" for name in ("w1", "w2", "w3")),
    "norm",
    "output",
}
KEYS = {
    "Llama-3-8B": LITGPT_KEYS | {"transformer.h.*.mlp.fc_1", "transformer.h.*.mlp.fc_2"},
    "pythia-14m": LITGPT_KEYS | {"transformer.h.*.mlp.fc"},
    "llama": LLAMA_KEYS,
    "feed_forward": {"", "w1", "w2", "w3"},
}


@pytest.mark.parametrize("name", KEYS)
def test_keys(name) -> None:
    assert set(fabric_tp.auto().plan(build(name), tensor_parallel_size=2)) == KEYS[name]


def test_layers_may_be_a_list() -> None:
    model: Any = Llama()
    model.layers = nn.ModuleList(model.layers.values())
    assert set(fabric_tp.llama().plan(model, tensor_parallel_size=2)) == LLAMA_KEYS


def test_feed_forwards_inside_a_model() -> None:
    model = nn.ModuleDict({"one": FeedForward(8, 16), "other": FeedForward(8, 16)})
    plan = fabric_tp.feed_forward().plan(model, tensor_parallel_size=2)
    assert set(plan) == {f"{name}{layer}" for name in ("one", "other") for layer in ("", ".w1", ".w2", ".w3")}


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("Llama-3-8B", "litgpt"), ("pythia-14m", "litgpt"), ("llama", "llama"), ("feed_forward", "feed_forward")],
)
def test_auto_recognises(name, architecture) -> None:
    assert recognise(build(name)).name == architecture


# What is refused.


def assert_refused(*messages: str, model: nn.Module, size: int, parallelize: fabric_tp.Parallelize) -> None:
    """With all these messages, as patterns, in the error."""
    with pytest.raises(ValueError) as error:
        parallelize.plan(model, tensor_parallel_size=size)
    assert all(message in str(error.value) for message in messages), str(error.value)


def test_heads_not_divisible() -> None:
    messages = ("tensor_parallel_size=3", "query heads=8", "transformer.h.0.attn", "are 1, 2, 4, 8.")
    assert_refused(*messages, model=build("Llama-3-8B"), size=3, parallelize=fabric_tp.litgpt())


def test_heads_in_metas_names_not_divisible() -> None:
    messages = ("tensor_parallel_size=16", "query heads=8", "layers.0.attention", "are 1, 2, 4, 8.")
    assert_refused(*messages, model=build("llama"), size=16, parallelize=fabric_tp.llama())


def test_key_and_value_heads_are_shared_by_more_ranks() -> None:
    """They are never a reason to refuse: each rank uses its part of the whole projections."""
    plan = fabric_tp.llama().plan(build("llama"), tensor_parallel_size=8)
    names = [f"layers.*.attention.w{name}" for name in "qkv"]
    assert [type(plan[name]) for name in names] == [Colwise, SharedHeads, SharedHeads]


def test_width_not_divisible() -> None:
    model = FeedForward(8, 30)
    messages = ("tensor_parallel_size=4", "weight.shape[0]=30", "w1", "are 1, 2, 3, 5, 6, 10, 15, 30.")
    assert_refused(*messages, model=model, size=4, parallelize=fabric_tp.feed_forward())


def test_vocabulary_not_divisible() -> None:
    model = GPT(litgpt_config("Llama-3-8B", padded_vocab_size=98))
    messages = ("tensor_parallel_size=4", "weight.shape[0]=98", "transformer.wte", "are 1, 2.")
    assert_refused(*messages, model=model, size=4, parallelize=fabric_tp.litgpt())


@pytest.mark.parametrize("size", [0, -2])
def test_no_ranks(size) -> None:
    messages = (f"tensor_parallel_size={size} must be at least 1",)
    assert_refused(*messages, model=build("Llama-3-8B"), size=size, parallelize=fabric_tp.litgpt())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sizes_that_work(size) -> None:
    fabric_tp.litgpt().check(build("Llama-3-8B"), tensor_parallel_size=size, sequence_length=LENGTH)


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
        ("activation_checkpointing", "some", "'none', 'full', 'selective'"),
        ("mixed_precision", "fp8", "None, 'bf16-mixed'"),
    ],
)
def test_option_values(factory, option, value, works) -> None:
    with pytest.raises(ValueError, match=f"{option}='{value}' is not known; it must be one of {works}"):
        getattr(fabric_tp, factory)(**{option: value})


SEQUENCE_LENGTH = (
    r"With sequence_parallel=True the sequence length must be a multiple of tensor_parallel_size=2, but is 15\."
    r" Pad the batch to 16, or use sequence_parallel=False\."
)


def test_sequence_length() -> None:
    with pytest.raises(ValueError, match=SEQUENCE_LENGTH):
        fabric_tp.litgpt().check(build("Llama-3-8B"), tensor_parallel_size=2, sequence_length=15)


def test_sequence_length_without_sequence_parallel() -> None:
    fabric_tp.litgpt(sequence_parallel=False).check(build("Llama-3-8B"), tensor_parallel_size=2, sequence_length=15)


def refuses_sequence_length() -> None:
    model = fabric_tp.litgpt()(build("Llama-3-8B"), mesh(1, 2))
    with pytest.raises(ValueError, match=SEQUENCE_LENGTH):
        model(torch.zeros(1, 15, dtype=torch.int64))


def test_sequence_length_of_a_batch(pool) -> None:
    pool(2)(refuses_sequence_length)


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


# What is left alone.


def config_is_untouched(sizes: Sizes) -> None:
    config = litgpt_config("Llama-3-8B")
    before = copy.deepcopy(config)
    model: Any = fabric_tp.litgpt()(GPT(config), mesh(*sizes))
    assert model.config is config
    assert config == before
    attention = model.transformer.h[0].attn.config
    assert (attention.n_head, attention.n_query_groups) == (8 // sizes[1], 4 // sizes[1])
    assert (attention.head_size, attention.n_embd) == (8, 64)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_config_is_untouched(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(config_is_untouched, sizes)


def parameter_names(sizes: Sizes, options: dict[str, Any]) -> list[str]:
    model = fabric_tp.litgpt(**options)(build("Llama-3-8B"), mesh(*sizes))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    return sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("activation_checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("compile", [False, True])
def test_names_have_no_prefixes(pool, activation_checkpointing, compile) -> None:
    options = {"activation_checkpointing": activation_checkpointing, "compile": compile}
    expected = []
    for name, _ in build("Llama-3-8B").named_parameters():
        parts = [name.replace("qkv", f"qkv.{part}") for part in "qkv"] if "qkv" in name else [name]
        expected += parts
    assert pool(4)(parameter_names, (2, 2), options) == sorted(expected)


def batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(VOCABULARY, (rows, LENGTH), generator=generator) for _ in range(2))
    return x, y


def backward(reference: nn.Module, model: nn.Module, sizes: Sizes) -> None:
    """Of the same batch for both."""
    x, y = batch(2 * sizes[0])
    F.cross_entropy(reference(x).flatten(0, 1), y.flatten()).backward()
    rank = mesh(*sizes).get_local_rank("data_parallel")
    fabric_tp.cross_entropy(model(x.chunk(sizes[0])[rank]), y.chunk(sizes[0])[rank]).backward()


def tied(model: Any) -> Any:
    model.transformer.wte.weight = model.lm_head.weight
    return model


def tied_parameter_stays_one(sizes: Sizes, device: str) -> None:
    with torch.device("meta"):
        model: Any = tied(GPT(litgpt_config("Llama-3-8B")))
    if device == "cpu":
        model = tied(build("Llama-3-8B"))
    model = fabric_tp.litgpt()(model, mesh(*sizes))
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" in names
    assert "transformer.wte.weight" not in names
    assert model.transformer.wte.weight is model.lm_head.weight
    reference: Any = tied(build("Llama-3-8B"))
    copy_parameters(model, reference)
    backward(reference, model, sizes)
    errors = _gradients(reference, model)
    assert errors["lm_head.weight"] <= TOLERANCE, errors


def copy_parameters(model: nn.Module, reference: nn.Module) -> None:
    whole: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        for part in "qkv":
            name = name.replace(f"qkv.{part}.", "qkv.")
        whole.setdefault(name, []).append(gather_shards(parameter))
    reference.load_state_dict({name: torch.cat(parts) for name, parts in whole.items()}, strict=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
def test_tied_embeddings(pool, sizes, device) -> None:
    pool(sizes[0] * sizes[1])(tied_parameter_stays_one, sizes, device)


def is_frozen(name: str) -> bool:
    return "wte" in name or "norm_1" in name or "attn" in name


def frozen_stays_frozen(sizes: Sizes) -> None:
    reference = build("Llama-3-8B")
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(not is_frozen(name))
    model = fabric_tp.litgpt()(copy.deepcopy(reference), mesh(*sizes))
    backward(reference, model, sizes)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not is_frozen(name), name
        if is_frozen(name):
            assert parameter.grad is None, name
        else:
            expected = reference.get_parameter(name).grad
            assert expected is not None
            error = (gather_shards(parameter.grad) - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE, (name, error.item())


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_frozen_parameters(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(frozen_stays_frozen, sizes)


# Plans of one's own.

MIXED: dict[str, Mapping[str, ParallelStyle]] = {
    "torch's": {"w1": ColwiseParallel(), "w3": ColwiseParallel(), "w2": RowwiseParallel()},
    "torch's w1": {"w1": ColwiseParallel(), "w3": Colwise(), "w2": Rowwise()},
    "torch's w2": {"w1": Colwise(), "w3": Colwise(), "w2": RowwiseParallel()},
    "ours": {"": PrepareInput(), "w1": Colwise(None), "w3": Colwise(None), "w2": Rowwise()},
    "replicated": {"*": Replicated()},
}


def trains_like_one_device(plan: Mapping[str, ParallelStyle], sizes: Sizes, by_torch: bool) -> None:
    reference = build("feed_forward")
    model: nn.Module = copy.deepcopy(reference)
    if by_torch:
        model = parallelize_module(model, mesh(*sizes)["tensor_parallel"], dict(plan))
    else:
        model = fabric_tp.from_plan(plan)(model, mesh(*sizes))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-5) for m in (reference, model)]
    rank = mesh(*sizes).get_local_rank("data_parallel")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(2 * sizes[0], LENGTH, 64, generator=generator) for _ in range(2))
        F.mse_loss(reference(x), y).backward()
        F.mse_loss(model(x.chunk(sizes[0])[rank]), y.chunk(sizes[0])[rank]).backward()
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.05) for m in (reference, model)]
        assert isinstance(norms[1], DTensor)
        torch.testing.assert_close(norms[1].full_tensor(), norms[0], rtol=TOLERANCE, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        expected = reference.get_parameter(name)
        error = (gather_shards(parameter) - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE, (name, error.item())


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("plan", MIXED.values(), ids=MIXED)
def test_from_plan_trains_like_one_device(pool, plan, sizes) -> None:
    pool(sizes[0] * sizes[1])(trains_like_one_device, plan, sizes, False)


@pytest.mark.parametrize("plan", MIXED.values(), ids=MIXED)
def test_styles_in_torchs_parallelize_module(pool, plan) -> None:
    pool(2)(trains_like_one_device, plan, (1, 2), True)


def head_and_embedding() -> None:
    """A small plan written by hand, of the ends of a model."""
    model: Any = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8), nn.Linear(8, VOCABULARY))
    reference = copy.deepcopy(model)
    plan = {
        "0": VocabParallelEmbedding(output_layout="sequence"),
        "1": Replicated("sequence"),
        "2": LMHead(input_layout="sequence"),
    }
    model = fabric_tp.from_plan(plan)(model, mesh(1, 2))
    copy_parameters(model, reference)
    backward(reference, model, (1, 2))
    errors = _gradients(reference, model)
    assert max(errors.values()) <= TOLERANCE, errors


def test_plan_by_hand_with_sequence_parallel(pool) -> None:
    pool(2)(head_and_embedding)


def patterns(plan: Mapping[str, ParallelStyle]) -> set[str]:
    return set(fabric_tp.from_plan(plan).plan(build("llama"), tensor_parallel_size=2))


def test_derived_plan_can_be_edited_and_used() -> None:
    plan = fabric_tp.llama().plan(build("llama"), tensor_parallel_size=2)
    plan["norm"] = Replicated("replicate")
    assert patterns(plan) == LLAMA_KEYS


def cut_by_the_model(sequence_parallel: bool) -> int:
    model = fabric_tp.litgpt(sequence_parallel=sequence_parallel)(build("Llama-3-8B"), mesh(1, 2))
    return len(model(torch.zeros(1, LENGTH, dtype=torch.int64), lm_head_chunk_size=LENGTH // 2))


def test_pieces_of_the_sequence_are_refused_under_sequence_parallelism(pool) -> None:
    assert pool(2)(cut_by_the_model, False) == 2
    with pytest.raises(AssertionError, match=r"lm_head_chunk_size=8 cuts the sequence .* fused_loss=True"):
        pool(2)(cut_by_the_model, True)
