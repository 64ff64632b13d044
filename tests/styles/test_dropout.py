"""Dropout with one seed: the same masks for the same samples on every mesh, and so the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from litgpt import GPT, lora
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

import fabric_tp
from fabric_tp.autograd.dropout import Mask, dropped
from fabric_tp.autograd.run_position import FORWARDS, RunPosition
from fabric_tp.parallelize import Parallelize
from fabric_tp.seeds import mix
from fabric_tp.styles import Colwise, Dropout, RandomHeads, Rowwise
from fabric_tp.styles.attention_heads import ShardHeads
from fabric_tp.styles.random_module import follow_run
from fabric_tp.testing import next_token_loss
from fabric_tp.testing.parity import TOLERANCE, _whole
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import LORA, one_of_each_structure, randomize, small_config, small_transformers
from tests.models import LENGTH, VOCABULARY, FeedForward, Llama, litgpt_config, rotate

MESHES = [(1, 2), (1, 4), (2, 1), (2, 2)]
BATCH, STEPS, RATE = 8, 2, 0.2


class DropoutAttention(nn.Module):
    """Attention with probabilities of its own, and dropouts on them, before and after the last layer."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_heads, width // n_heads
        for name in ("wq", "wk", "wv", "wo"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.probabilities = nn.Dropout(RATE)
        self.both = nn.Dropout(RATE)

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (self.n_heads, -1)) for each in (self.wq, self.wk, self.wv))
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q, freqs), rotate(k, freqs)) / self.head_dim**0.5
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        shares = self.probabilities(scores.masked_fill(~causal, -torch.inf).softmax(-1))
        y = torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(2)
        return self.both(self.wo(self.both(y)))


class DropoutFeedForward(FeedForward):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.hidden, self.last = nn.Dropout(RATE), nn.Dropout(RATE, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.w2(self.hidden(F.silu(self.w1(x)) * self.w3(x))))


class DropoutLlama(Llama):
    """A Llama with dropout wherever it can be; ``checkpointed``: "no", "reentrant", "yes" or "wrongly"."""

    def __init__(self, checkpointed: str = "no", hidden: int = 96) -> None:
        super().__init__()
        for layer in self.layers.values():
            layer.attention = DropoutAttention(64, 8)
            layer.feed_forward = DropoutFeedForward(64, hidden)
            layer.register_forward_hook(lambda module, args, y: module.get_submodule("residual")(y))
            layer.residual = nn.Dropout(RATE)
        self.embedding_dropout, self.checkpointed = nn.Dropout(RATE), checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding_dropout(self.tok_embeddings(tokens))
        scale = 1.0 / 10000 ** (torch.arange(0, self.head_dim, 2, dtype=x.dtype) / self.head_dim)
        freqs = torch.outer(torch.arange(tokens.shape[1], dtype=x.dtype), scale)
        options = {
            "use_reentrant": self.checkpointed == "reentrant",
            "preserve_rng_state": self.checkpointed != "wrongly",
        }
        for layer in self.layers.values():
            x = layer(x, freqs) if self.checkpointed == "no" else checkpoint(layer, x, freqs, **options)
        return self.output(self.norm(x))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize(make())


def everywhere(checkpointed: str = "no") -> nn.Module:
    return seeded(partial(DropoutLlama, checkpointed))


def residual(name: str = "Llama-3-8B") -> nn.Module:
    """litgpt with dropouts in the places of norms that this model lacks."""
    model: Any = seeded(lambda: GPT(litgpt_config(name)))
    for block in model.transformer.h:
        block.post_attention_norm, block.post_mlp_norm = nn.Dropout(RATE), nn.Dropout(RATE)
    return model


def adapters(name: str = "Llama-3-8B") -> nn.Module:
    config = small_config(name, lora.Config, lora_r=4, lora_dropout=0.1, **LORA["every layer"])
    model = seeded(lambda: lora.GPT(config))
    lora.mark_only_lora_as_trainable(model)
    return model


def samples(step: int) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def parallelized(build: Callable[[], nn.Module], options: dict[str, Any], sizes: tuple[int, int], seed: int = 7) -> Any:
    """Only the first rank's seed counts, and afterwards no rank's generator is like another's."""
    torch.manual_seed(seed + dist.get_rank())
    model = fabric_tp.auto(**options)(build(), mesh(*sizes)).train()
    torch.manual_seed(dist.get_rank() * 1000)
    return model


def train_step(model: nn.Module, step: int, sizes: tuple[int, int], micro_batches: int) -> dict[str, Tensor]:
    """Loss and gradients of a global batch of which each rank takes its samples."""
    rank = mesh(*sizes).get_local_rank("data_parallel")
    total = torch.zeros(())
    for number, tokens in enumerate(samples(step).chunk(micro_batches)):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(number == micro_batches - 1)
        mine = tokens[rank :: sizes[0]]
        loss = next_token_loss(model(mine), mine) / micro_batches
        loss.backward()
        total += loss.detach() / sizes[0]
    dist.all_reduce(total, group=mesh(*sizes).get_group("data_parallel"))
    return {"loss": total, **{name: grad.clone() for name, grad in _whole(model, lambda p: p.grad).items()}}


def train(
    build: Callable[[], nn.Module],
    options: dict[str, Any],
    sizes: tuple[int, int],
    micro_batches: int = 1,
    steps: int = STEPS,
    break_model: Callable[[nn.Module], None] | None = None,
) -> dict[str, Tensor]:
    model = parallelized(build, options, sizes)
    if break_model:
        break_model(model)
    result = {}
    for step in range(steps):
        result |= {
            f"{name} of step {step}": each for name, each in train_step(model, step, sizes, micro_batches).items()
        }
        model.zero_grad()
    return result


def worst(result: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert result.keys() == expected.keys()
    return max(
        float((each - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-30))
        for name, each in result.items()
    )


MODELS = {
    "everywhere": everywhere,
    "residual": residual,
    "shared norm": partial(residual, "falcon-7b"),
    "adapters": adapters,
}


@pytest.fixture(scope="module")
def one_device(pool) -> Callable[[Callable[[], nn.Module]], dict[str, Tensor]]:
    """Losses and gradients on a mesh of one rank."""
    known: dict[str, dict[str, Tensor]] = {}

    def get(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
        if str(build) not in known:
            known[str(build)] = pool(1)(train, build, {}, (1, 1))
        return known[str(build)]

    return get


class ExplicitDropout(nn.Module):
    """Multiplies by the mask that the module of this name should have, in the first forward of the run."""

    def __init__(self, name: str, rate: float) -> None:
        super().__init__()
        self.name, self.rate, self.calls = name, rate, 0

    def forward(self, x: Tensor) -> Tensor:
        drops = dropped(x.shape, Mask(self.rate, mix(7, self.name, self.calls)), x.device)
        self.calls += 1
        return x * ~drops / (1 - self.rate)


@pytest.mark.parametrize("model", MODELS)
def test_one_device_is_a_plain_model_with_explicit_masks(one_device, model) -> None:
    plain = MODELS[model]()
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.Dropout):
            owner, _, own = name.rpartition(".")
            setattr(plain.get_submodule(owner), own, ExplicitDropout(name, module.p))
    loss = next_token_loss(plain(samples(0)), samples(0))
    loss.backward()
    result = {"loss": loss.detach(), **{name: p.grad for name, p in plain.named_parameters() if p.grad is not None}}
    expected = {name: each for name, each in one_device(MODELS[model]).items() if name.endswith("step 0")}
    assert worst({f"{name} of step 0": each for name, each in result.items()}, expected) < TOLERANCE


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_training_is_that_of_one_device(pool, one_device, model, sizes) -> None:
    result = pool(sizes[0] * sizes[1])(train, MODELS[model], {}, sizes)
    assert worst(result, one_device(MODELS[model])) < TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_without_sequence_parallel(pool, one_device, model) -> None:
    result = pool(2)(train, MODELS[model], {"sequence_parallel": False}, (1, 2))
    assert worst(result, one_device(MODELS[model])) < TOLERANCE


@pytest.mark.parametrize("model", ["everywhere", "adapters"])
def test_replicated_attention(pool, one_device, model) -> None:
    result = pool(2)(train, MODELS[model], {"replicate_attention": True}, (1, 2))
    assert worst(result, one_device(MODELS[model])) < TOLERANCE


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 2)], ids=str)
def test_micro_batches(pool, one_device, sizes) -> None:
    result = pool(sizes[0] * sizes[1])(train, everywhere, {}, sizes, micro_batches=4)
    assert worst(result, one_device(everywhere)) < TOLERANCE


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("model", ["everywhere", "adapters"])
def test_activation_checkpointing(pool, one_device, model, kind, sizes) -> None:
    options = {"activation_checkpointing": kind}
    result = pool(sizes[0] * sizes[1])(train, MODELS[model], options, sizes, micro_batches=2)
    assert worst(result, one_device(MODELS[model])) < TOLERANCE


@pytest.mark.parametrize("checkpointed", ["yes", "reentrant"])
def test_checkpointing_in_the_model(pool, one_device, checkpointed) -> None:
    result = pool(2)(train, partial(everywhere, checkpointed), {}, (1, 2), micro_batches=2)
    assert worst(result, one_device(everywhere)) < TOLERANCE


def checkpoints_without_random_state() -> None:
    with pytest.raises(ValueError, match="preserve_rng_state=False, which must be True"):
        train(partial(everywhere, "wrongly"), {}, (1, 1))


def test_checkpointing_without_random_state_is_refused(pool) -> None:
    pool(1)(checkpoints_without_random_state)


def train_with_reseeding() -> dict[str, Tensor]:
    """Somebody sets torch's generator to the same state before each forward."""
    model = parallelized(everywhere, {"activation_checkpointing": "full"}, (1, 1))
    model.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)
    result = {}
    for step in range(STEPS):
        result |= {f"{name} of step {step}": each for name, each in train_step(model, step, (1, 1), 4).items()}
        model.zero_grad()
    return result


def test_reseeding_changes_nothing(pool, one_device) -> None:
    assert worst(pool(1)(train_with_reseeding), one_device(everywhere)) < TOLERANCE


@pytest.mark.parametrize("kind", ["none", "full"])
def test_compile(pool, one_device, kind) -> None:
    pool(2)(torch.compiler.reset)
    result = pool(2)(train, residual, {"compile": True, "activation_checkpointing": kind}, (1, 2))
    assert worst(result, one_device(residual)) < TOLERANCE


def test_mixture_of_experts(pool) -> None:
    """The experts' tokens are the same on all tensor-parallel ranks, and so are their masks."""
    build = partial(adapters, "Mixtral-8x7B-v0.1")
    result = pool(2)(train, build, {"activation_checkpointing": "full"}, (1, 2))
    assert worst(result, pool(1)(train, build, {}, (1, 1))) < TOLERANCE


# The masks themselves


def whole_masks(
    sizes: tuple[int, int],
    options: dict[str, Any],
    micro_batches: int = 1,
    seed: int = 7,
    break_model: Callable[[nn.Module], None] | None = None,
) -> dict[str, Tensor]:
    """What each call of each dropout drops, gathered from all ranks, sample by sample."""
    model = parallelized(everywhere, options, sizes, seed)
    if break_model:
        break_model(model)
    calls: dict[str, list[Tensor]] = {}

    def remember(name: str, module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        style = module.parallelized.style
        zeros = (y == 0).to(torch.uint8)
        dim = style.shard_dim(zeros) if sizes[1] > 1 else None
        calls.setdefault(name, []).append(_gathered(zeros, sizes, dim))

    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(partial(remember, name))
    rank = mesh(*sizes).get_local_rank("data_parallel")
    with torch.no_grad():
        for step in range(STEPS):
            for tokens in samples(step).chunk(micro_batches):
                model(tokens[rank :: sizes[0]])
    twice = {name: 2 if name.endswith("both") else 1 for name in calls}
    return {
        f"{name}, call {call}": torch.cat(masks[call :: twice[name]])
        for name, masks in calls.items()
        for call in range(twice[name])
    }


def _gathered(mask: Tensor, sizes: tuple[int, int], dim: int | None) -> Tensor:
    parts = [torch.empty_like(mask, memory_format=torch.contiguous_format) for _ in range(sizes[1])]
    dist.all_gather(parts, mask.contiguous(), group=mesh(*sizes).get_group("tensor_parallel"))
    if dim is None:
        assert all(torch.equal(part, parts[0]) for part in parts)
    whole = parts[0] if dim is None else torch.cat(parts, dim)
    replicas = [torch.empty_like(whole) for _ in range(sizes[0])]
    dist.all_gather(replicas, whole, group=mesh(*sizes).get_group("data_parallel"))
    return torch.stack(replicas, 1).flatten(0, 1)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), *MESHES], ids=str)
def test_masks_are_bitwise_the_same(pool, sizes, sequence_parallel, micro_batches) -> None:
    expected = pool(1)(whole_masks, (1, 1), {})
    masks = pool(sizes[0] * sizes[1])(whole_masks, sizes, {"sequence_parallel": sequence_parallel}, micro_batches)
    assert len(masks) == 1 + 2 * 6
    assert masks.keys() == expected.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name]), name


def test_masks_differ_between_modules_calls_steps_and_samples(pool) -> None:
    masks = pool(1)(whole_masks, (1, 1), {})
    wide = [mask for name, mask in masks.items() if mask.shape == (STEPS * BATCH, LENGTH, 64)]
    rows = torch.cat(wide).flatten(1)
    assert len(rows) == 9 * STEPS * BATCH
    centred = (rows.double() - RATE) / (RATE * (1 - RATE)) ** 0.5
    correlations = centred @ centred.T / rows.shape[1] ** 0.5
    correlations.fill_diagonal_(0)
    assert float(correlations.abs().max()) < 6


def test_masks_differ_between_seeds(pool) -> None:
    one, other = (pool(1)(whole_masks, (1, 1), {}, seed=seed) for seed in (7, 8))
    assert not any(torch.equal(mask, other[name]) for name, mask in one.items())


# Mutations that the comparisons above must notice


def set_layout(name: str, layout: Any, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if path.endswith(name):
            module.parallelized.style = Dropout(layout)  # type: ignore[union-attr, assignment]


def number_samples_by_rank(model: nn.Module) -> None:
    position = model.get_submodule("embedding_dropout").position
    assert isinstance(position, RunPosition)
    position.data_parallel_rank, position.data_parallel_size = 0, 1


@pytest.mark.parametrize(
    ("sizes", "mutation"),
    [
        ((1, 2), partial(set_layout, "last", "replicate")),
        ((1, 2), partial(set_layout, "hidden", "replicate")),
        ((1, 2), partial(set_layout, "probabilities", "replicate")),
        ((1, 2), partial(set_layout, "residual", "features")),
        ((2, 1), number_samples_by_rank),
    ],
    ids=["last", "hidden", "probabilities", "residual", "samples"],
)
def test_notices_mutations(pool, one_device, sizes, mutation) -> None:
    result = pool(2)(train, everywhere, {}, sizes, break_model=mutation)
    assert worst(result, one_device(everywhere)) > 10 * TOLERANCE


# Evaluation, plans, and what cannot be


def assert_evaluation_leaves_no_trace() -> None:
    model = parallelized(everywhere, {}, (1, 2))
    position = model.embedding_dropout.position
    model.eval()
    before = torch.get_rng_state()
    first, second = model(samples(0)), model(samples(0))
    assert torch.equal(first.to_local(), second.to_local())
    assert torch.equal(torch.get_rng_state(), before)
    assert position.samples == 0


def test_evaluation_drops_nothing(pool) -> None:
    pool(2)(assert_evaluation_leaves_no_trace)


def styles_of(parallelize: Parallelize, model: nn.Module, size: int = 2) -> dict[str, str]:
    plan = parallelize.plan(model, tensor_parallel_size=size)
    return {name: style.layout for name, style in plan.items() if isinstance(style, Dropout)}


def test_plan_of_a_hand_written_model() -> None:
    assert styles_of(fabric_tp.llama(), everywhere()) == {
        "embedding_dropout": "sequence",
        "layers.*.residual": "sequence",
        "layers.*.attention.probabilities": "features",
        "layers.*.attention.both": "features",
        "layers.*.feed_forward.hidden": "features",
        "layers.*.feed_forward.last": "features",
    }


def test_plan_of_adapters() -> None:
    assert styles_of(fabric_tp.litgpt(), adapters()) == {
        "lm_head.lora_dropout": "replicate",
        "transformer.h.*.attn.qkv.lora_dropout": "replicate",
        "transformer.h.*.attn.proj.lora_dropout": "features",
        "transformer.h.*.mlp.fc_1.lora_dropout": "replicate",
        "transformer.h.*.mlp.fc_2.lora_dropout": "replicate",
        "transformer.h.*.mlp.proj.lora_dropout": "features",
    }


@pytest.mark.parametrize("name", one_of_each_structure())
def test_every_dropout_of_adapters_has_a_style(name) -> None:
    model = adapters(name)
    fabric_tp.litgpt(replicate_attention=name == "falcon-7b").check(model, tensor_parallel_size=2)


def test_explain_shows_dropouts() -> None:
    text = fabric_tp.llama().explain(everywhere(), tensor_parallel_size=2)
    assert any("layers.*.feed_forward.hidden x 2" in line and "Dropout" in line for line in text.splitlines())


def test_feed_forward(pool) -> None:
    expected, result = (pool(size)(feed_forward_output, (1, size)) for size in (1, 2))
    assert (result - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert (expected == 0).any()


def feed_forward_output(sizes: tuple[int, int]) -> Tensor:
    torch.manual_seed(0)
    model = fabric_tp.feed_forward()(nn.Sequential(DropoutFeedForward(64, 96), nn.Dropout(RATE)), mesh(*sizes))
    return model(torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(1))).detach()


def test_ambiguous_width_is_refused() -> None:
    model = seeded(partial(DropoutLlama, hidden=128))
    message = r"hidden is a Dropout .* 128 hidden features are 64 on each of 2 ranks.*from_plan\(plan\)"
    with pytest.raises(ValueError, match=message):
        fabric_tp.llama().check(model, tensor_parallel_size=2)
    fabric_tp.llama().check(model, tensor_parallel_size=4)


def test_advice_for_an_ambiguous_width_works() -> None:
    model = seeded(partial(DropoutLlama, hidden=128))
    plan = fabric_tp.auto().plan(model, tensor_parallel_size=1)
    plan["layers.*.feed_forward.hidden"] = Dropout("features")
    plan["layers.*.feed_forward.last"] = Dropout("sequence")
    fabric_tp.from_plan(plan, blocks="layers").check(model, tensor_parallel_size=2)


def test_unknown_place_is_refused() -> None:
    model: Any = small_transformers("Llama")
    model.model.dropout = nn.Dropout(RATE)
    with pytest.raises(ValueError, match=r"model\.dropout is a Dropout between the embedding.*sequence_parallel=False"):
        fabric_tp.auto().check(model, tensor_parallel_size=2)
    fabric_tp.auto(sequence_parallel=False).check(model, tensor_parallel_size=2)


@pytest.mark.parametrize("cls", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout])
def test_uncovered_dropout_is_refused(cls) -> None:
    model = nn.Sequential(nn.Linear(4, 4), cls(0.5))
    plan = fabric_tp.from_plan({"0": Colwise()})
    with pytest.raises(ValueError, match=rf"covers 1, a {cls.__name__} with p=0.5"):
        plan.check(model, tensor_parallel_size=2)
    plan.check(model, tensor_parallel_size=1)
    model[1].p = 0.0
    plan.check(model, tensor_parallel_size=2)


def test_style_takes_only_dropout() -> None:
    with pytest.raises(ValueError, match=r"0: Dropout takes a torch\.nn\.Dropout, and this is a Linear"):
        fabric_tp.from_plan({"0": Dropout()}).check(nn.Sequential(nn.Linear(4, 4)), tensor_parallel_size=1)


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="layout='heads' is not known"):
        Dropout("heads")  # type: ignore[arg-type]


def use_torchs_parallelize_module() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))

    mesh_1d: DeviceMesh = mesh(1, 2)["tensor_parallel"]
    plan: dict[str, Any] = {"0": Colwise(), "1": Dropout("features"), "2": Rowwise()}
    model = parallelize_module(build(), mesh_1d, plan)
    with pytest.raises(ValueError, match=r"does not know the seed.*from_plan\(plan\)"):
        model(torch.randn(2, 3, 8))
    follow_run(model, mesh_1d, seed=0)
    model(torch.randn(2, 3, 8))


def test_torchs_parallelize_module(pool) -> None:
    pool(2)(use_torchs_parallelize_module)


def assert_records_are_bounded() -> None:
    model = parallelized(residual, {}, (1, 1))
    position = model.transformer.h[0].post_mlp_norm.position
    for step in range(2 * FORWARDS):
        model(samples(step))
    assert len(position._forwards) == FORWARDS
    assert all(len(forward.records) == 4 for forward in position._forwards)


def test_records_are_bounded(pool) -> None:
    pool(1)(assert_records_are_bounded)


# Dropout inside of attention kernels


def random_llama() -> nn.Module:
    return small_transformers("Llama", attention_dropout=0.5, attn_implementation="eager")


def kernel_masks(sizes: tuple[int, int], kind: str, replicate_attention: bool = False) -> list[list[Tensor]]:
    """Of each rank, in the order of calls; with activation checkpointing the backward calls again."""
    options = {"activation_checkpointing": kind, "replicate_attention": replicate_attention}
    model = parallelized(random_llama, options, sizes)
    torch.manual_seed(0)
    tokens = samples(0)[mesh(*sizes).get_local_rank("data_parallel") :: sizes[0]]
    masks: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, y: masks.append((y[1] == 0).to(torch.uint8)))
    next_token_loss(model(input_ids=tokens).logits, tokens).backward()
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, masks)
    return everyones


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
def test_kernels_draw_different_masks_on_all_ranks(pool, sizes) -> None:
    first, second = pool(2)(kernel_masks, sizes, "none")
    assert len(first) == 2
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(mask, other) for mask, other in zip(first, second, strict=True))


def test_kernels_of_replicated_attention_draw_the_same(pool) -> None:
    first, second = pool(2)(kernel_masks, (1, 2), "none", replicate_attention=True)
    assert all(torch.equal(mask, other) for mask, other in zip(first, second, strict=True))


def test_kernels_draw_the_same_masks_again(pool) -> None:
    once = pool(2)(kernel_masks, (1, 2), "none")
    for mine, expected in zip(pool(2)(kernel_masks, (1, 2), "full"), once, strict=True):
        assert len(mine) == 4
        assert torch.equal(mine[0], expected[0])
        assert torch.equal(mine[1], expected[1])
        assert {m.numpy().tobytes() for m in mine[2:]} == {m.numpy().tobytes() for m in mine[:2]}


def test_generator_is_restored() -> None:
    position = RunPosition(seed=0)
    position.call("a")
    expected = torch.get_rng_state()
    draws = []
    for rank in (0, 0, 1):
        torch.set_rng_state(expected)
        with position.seeded("a", torch.device("cpu"), rank):
            draws.append(torch.rand(()).item())
        after = torch.get_rng_state()
        torch.set_rng_state(expected)
        position.call("a")  # which draws once
        assert torch.equal(after, torch.get_rng_state())
    assert len(set(draws)) == 3


def test_kernels_without_dropout_need_nothing() -> None:
    plan = fabric_tp.auto().plan(small_transformers("Llama"), tensor_parallel_size=2)
    assert type(plan["model.layers.*.self_attn"]) is ShardHeads
    plan = fabric_tp.auto().plan(random_llama(), tensor_parallel_size=2)
    assert type(plan["model.layers.*.self_attn"]) is RandomHeads
