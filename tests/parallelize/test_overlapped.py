"""Blocks that compute half of their batch while the collectives of the other half run."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fabric_tp
from fabric_tp.autograd import halves
from fabric_tp.loss.deferred import DeferredLogits
from fabric_tp.parallelize import overlapped, parallelize
from fabric_tp.testing import Report, next_token_loss
from fabric_tp.testing.parity import compare
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import small_causal, small_config, small_gpt, small_lora
from tests.models import LENGTH, VOCABULARY, build
from tests.parity import differences_of

LLAMA = partial(build, "Llama-3-8B")


def tokens(batch: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


def assert_overlapped_equals(pool, build_model, parallelize_fn, sizes=(1, 2), batch=4, steps=1, **more) -> None:
    inputs = tokens(batch * sizes[0])
    differences = differences_of(pool, build_model, parallelize_fn, sizes, inputs=inputs, steps=steps, **more)
    assert Report(differences).equal, str(Report(differences))


@pytest.mark.swept(lambda p: p["sizes"] == (2, 2) and p["options"].get("activation_checkpointing") != "selective")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sequence_parallel": False},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "selective", "sequence_parallel": False},
        {"lean": False, "regather": False},
        {"loss_parallel": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_equals_one_device(pool, sizes, options) -> None:
    assert_overlapped_equals(pool, LLAMA, fabric_tp.litgpt(overlap=True, **options), sizes, steps=3)


GPT = {
    "experts": partial(build, "Mixtral-8x7B-v0.1"),
    "parallel residual": partial(build, "pythia-14m"),
    "one norm for both": partial(build, "phi-2"),
    "windows, norms of heads": partial(small_gpt, small_config("Gemma-3-1b-it")),
    "softcapping": partial(small_gpt, small_config("Gemma-2-2b")),
    "adapters": partial(small_lora, "Llama-3-8B", "every layer"),
    "adapters after a frozen attention": partial(small_lora, "Llama-3-8B", "MLP"),
}


@pytest.mark.swept(lambda p: p["name"] not in ("experts", "softcapping", "adapters"))
@pytest.mark.parametrize("name", GPT)
def test_litgpt(pool, name) -> None:
    assert_overlapped_equals(pool, GPT[name], fabric_tp.litgpt(overlap=True, fused_loss=name != "adapters"))


@pytest.mark.swept(lambda p: p["name"] not in ("experts", "adapters after a frozen attention"))
@pytest.mark.parametrize("name", GPT)
def test_litgpt_checkpointed(pool, name) -> None:
    """Whose halves take turns in the same places when they are computed again."""
    parallelize_fn = fabric_tp.litgpt(overlap=True, activation_checkpointing="selective")
    assert_overlapped_equals(pool, GPT[name], parallelize_fn)


TYPES = ["gpt2", "mistral", "deepseek_v3", "gpt_oss", "qwen3_moe", "gemma3_text", "bloom", "falcon", "mpt", "opt"]


@pytest.mark.swept(lambda p: p["model_type"] not in ("gpt2", "bloom"))
@pytest.mark.parametrize("model_type", TYPES)
def test_transformers(pool, model_type) -> None:
    assert_overlapped_equals(pool, partial(small_causal, model_type), fabric_tp.auto(overlap=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_two_do_not_divide(pool, batch) -> None:
    assert_overlapped_equals(pool, LLAMA, fabric_tp.litgpt(overlap=True), batch=batch)


def test_four_ranks_and_a_length_that_they_do_not_divide(pool) -> None:
    inputs = tokens(4)[:, :13]
    differences = differences_of(pool, LLAMA, fabric_tp.litgpt(overlap=True), (1, 4), inputs=inputs)
    assert Report(differences).equal, str(Report(differences))


def with_dropout(overlap: bool) -> list[Tensor]:
    """Losses and a gradient, which depend on every mask."""
    model = small_causal("gpt2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.0)
    torch.manual_seed(5)
    model = fabric_tp.auto(overlap=overlap)(model.train(), mesh(1, 2))
    losses = []
    for _ in range(2):
        loss = next_token_loss(model(tokens(4)), tokens(4))
        loss.backward()
        losses.append(loss.detach())
    weight: Any = model.get_parameter("transformer.h.1.ln_1.weight")
    return [*losses, weight.grad.full_tensor()]


def test_masks_are_those_of_the_whole_batch(pool) -> None:
    torch.testing.assert_close(pool(2)(with_dropout, True), pool(2)(with_dropout, False))


def other_samples_of_a_model(broken: bool) -> dict[str, float]:
    """On a rank; deferred logits are joined in the order of their samples."""
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            joined = DeferredLogits.of_samples
            patch.setattr(DeferredLogits, "of_samples", lambda parts: joined(parts[::-1]))
        return compare(
            LLAMA, fabric_tp.litgpt(overlap=True, fused_loss=True), tokens(4), next_token_loss, (1, 2), 1, None
        )


def test_swapped_samples_are_noticed(pool) -> None:
    assert Report(pool(2)(other_samples_of_a_model, False)).equal
    assert not Report(pool(2)(other_samples_of_a_model, True)).equal


class _Trace(TorchDispatchMode):
    """What was issued and awaited, and matrix products, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []
        self.alive: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = str(operation)
        if "_c10d_functional.wait_tensor" in name:
            self.events.append(("wait", args[0].data_ptr()))
        elif "_c10d_functional" in name or "_allgather_base_" in name or "alltoall_base_" in name:
            made = result if isinstance(result, Tensor) else args[0]
            self.alive.append(made)
            self.events.append(("issue", made.data_ptr()))
        elif "mm" in name:
            self.events.append(("product", 0))
        return result

    def exposed(self) -> Counter[bool]:
        """How many collectives have no product between issue and wait, and how many have."""
        found: Counter[bool] = Counter()
        for place, (what, address) in enumerate(self.events):
            if what == "issue":
                end = self.events.index(("wait", address), place)
                found[("product", 0) not in self.events[place:end]] += 1
        return found


def exposed(
    layers: int, options: dict[str, Any], batch: int = 4, by_blocks: bool = False
) -> tuple[Counter[bool], Counter[bool]]:
    """In forward and backward of so many blocks.

    Args:
        by_blocks: Each is halved by itself, as with FSDP2.
    """
    from litgpt import GPT

    from tests.models import litgpt_config

    with pytest.MonkeyPatch.context() as patch:
        if by_blocks:
            patch.setattr(parallelize, "goes_through_in_halves", lambda *_: False)
        model = fabric_tp.litgpt(**options)(GPT(litgpt_config("Llama-3-8B", n_layer=layers)), mesh(1, 2))
    inputs = tokens(batch)
    next_token_loss(model(inputs), inputs).backward()
    with _Trace() as forward:
        loss = next_token_loss(model(inputs), inputs)
    with _Trace() as backward:
        loss.backward()
    return forward.exposed(), backward.exposed()


EXPOSED = {
    ("model", True): ((0, 8), (0, 12)),
    ("model", False): ((0, 4), (0, 4)),
    # The first gather and the last sum of a block; the gradient of its first input.
    ("blocks", True): ((2, 8), (1, 12)),
    ("blocks", False): ((1, 4), (0, 4)),
    ("nothing", True): ((4, 4), (2, 6)),
    ("nothing", False): ((2, 2), (0, 2)),
}
"""By what is halved and sequence_parallel, of the collectives of a block, in the forward and in the backward."""


@pytest.mark.parametrize(("halved", "sequence_parallel"), EXPOSED)
def test_products_run_beside_collectives(pool, halved, sequence_parallel) -> None:
    options = {"overlap": halved != "nothing", "sequence_parallel": sequence_parallel, "fused_loss": True}
    one, three = (pool(2)(exposed, layers, options, 4, halved == "blocks") for layers in (1, 3))
    for few, many, expected in zip(one, three, EXPOSED[halved, sequence_parallel], strict=True):
        of_a_block = {key: (many[key] - few[key]) / 2 for key in (True, False)}
        assert (of_a_block[True], sum(of_a_block.values())) == expected


@pytest.mark.parametrize(
    ("sequence_parallel", "expected"), [(True, ((4, 6), (2, 9))), (False, ((2, 3), (0, 3)))], ids=str
)
def test_tokens_of_one_sample_take_turns_in_mlps(pool, sequence_parallel, expected) -> None:
    """Attention's collectives are exposed as without overlap, and of the MLP's the first gather and the last sum."""
    options = {"overlap": True, "sequence_parallel": sequence_parallel, "fused_loss": True}
    one, three = (pool(2)(exposed, layers, options, 1) for layers in (1, 3))
    for few, many, each in zip(one, three, expected, strict=True):
        of_a_block = {key: (many[key] - few[key]) / 2 for key in (True, False)}
        assert (of_a_block[True], sum(of_a_block.values())) == each


@pytest.mark.parametrize(
    "options", [{}, {"sequence_parallel": False}, {"activation_checkpointing": "selective"}, {"lean": False}], ids=str
)
def test_one_sample_equals_one_device(pool, options) -> None:
    assert_overlapped_equals(pool, LLAMA, fabric_tp.litgpt(overlap=True, **options), (2, 2), 1, steps=3)


def one_sample(model_type: str, broken: bool) -> dict[str, float]:
    """On a rank, of a length that the ranks do not divide where it is as it should be."""
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            patch.setattr(overlapped, "part_of", lambda x, dim, first, length: x.narrow(dim, 0, length))
        inputs = tokens(1) if broken else tokens(1)[:, :13]
        build_model = partial(small_causal, model_type)
        return compare(build_model, fabric_tp.auto(overlap=True), inputs, next_token_loss, (1, 2), 1, None)


@pytest.mark.parametrize(("model_type", "broken"), [("llama", False), ("gpt2", False), ("llama", True)])
def test_one_sample_of_any_length(pool, model_type, broken) -> None:
    assert Report(pool(2)(one_sample, model_type, broken)).equal is not broken


def test_an_error_in_one_half_ends_both() -> None:
    ended: list[int] = []

    def half(index: int) -> None:
        try:
            halves.give_way()
            if index:
                raise ValueError("in a half")
            halves.give_way()
        finally:
            ended.append(index)

    with pytest.raises(ValueError, match="in a half"):
        halves.take_turns(half, [1, 1])
    assert sorted(ended) == [0, 1]
    assert halves.current_half() is None


class Router(nn.Linear):
    """Returns something of the whole batch beside what it computes."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return (y, y.mean()) if self.out_features == 4 else (y, object())


def of_the_whole_batch(features: int) -> str:
    model = Router(4, features)
    fabric_tp.from_plan({"": fabric_tp.styles.Replicated("replicate")}, overlap=True)(model, mesh(1, 2))
    with pytest.raises(ValueError) as error:
        model(torch.ones(2, 3, 4))
    return str(error.value)


def test_results_of_the_whole_batch_are_refused(pool) -> None:
    assert "returns a tensor () without a dimension of 1 samples" in pool(2)(of_the_whole_batch, 4)
    assert "returns a object" in pool(2)(of_the_whole_batch, 2)


class Shifted(nn.Linear):
    """Given something for each sample, or for each token, beside its input."""

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        self.seen = [*getattr(self, "seen", []), tuple(by.shape)]
        return super().forward(x) + (by[:, None, None] if len(by) == len(x) else by[:, None])


def shifted(batch: int, length: int, by: int) -> list[tuple[int, ...]]:
    torch.manual_seed(0)
    model = Shifted(8, 8)
    x, shift = torch.randn(batch, length, 8), torch.arange(by) * 1.0
    expected = model(x, shift)
    fabric_tp.from_plan({"": fabric_tp.styles.Replicated("replicate")}, overlap=True)(model, mesh(1, 2))
    torch.testing.assert_close(model(x, shift), expected)
    return model.seen[1:]


def test_numbers_of_samples_are_halved_and_those_of_tokens_are_not(pool) -> None:
    assert pool(2)(shifted, 4, 3, 4) == [(2,), (2,)]
    assert pool(2)(shifted, 4, 3, 3) == [(3,), (3,)]
    assert pool(2)(shifted, 3, 3, 3) == [(3,)]  # nobody knows: a whole batch


def with_cache() -> tuple[list[str], float]:
    model = small_causal("llama")
    model.config.use_cache = True
    expected = model(tokens(4)).logits
    model = fabric_tp.auto(overlap=True, loss_parallel=False)(model, mesh(1, 2))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = model(tokens(4)).logits
    return [str(each.message) for each in warned], float((found - expected).abs().max() / expected.abs().max())


def test_blocks_that_are_given_a_cache_compute_whole_batches(pool) -> None:
    warned, difference = pool(2)(with_cache)
    assert any("given a DynamicCache" in message and "use_cache=False" in message for message in warned)
    assert difference < 2e-5
