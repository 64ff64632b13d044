"""Text from a parallelized model is that of a plain loop on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fabric_tp
from fabric_tp.testing.ranks import mesh
from tests.models import VOCABULARY, build

PROMPT, NEW = 7, 9
MESHES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)]


def prompt(length: int = PROMPT) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))


def greedy(tokens: Tensor, new: int = NEW, name: str = "Llama-3-8B") -> list[int]:
    """The likeliest next token, again and again, by the model on one device."""
    model = build(name).eval()
    with torch.no_grad():
        for _ in range(new):
            tokens = torch.cat([tokens, model(tokens[None])[0, -1].argmax()[None]])
    return tokens.tolist()


def parallelized(sizes: tuple[int, int], name: str = "Llama-3-8B", **options: Any) -> nn.Module:
    return fabric_tp.auto(**options)(build(name), mesh(*sizes))


def generate(
    sizes: tuple[int, int],
    tokens: Tensor,
    options: dict[str, Any],
    name: str = "Llama-3-8B",
    new: int = NEW,
    **how: Any,
) -> list[int]:
    """The same on every rank, or it fails."""
    mine = fabric_tp.generate(parallelized(sizes, name, **options), tokens, new, **how)
    of_all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all_ranks, mine)
    assert all(torch.equal(other, mine) for other in of_all_ranks), of_all_ranks
    return mine.tolist()


@pytest.mark.swept(lambda p: p["sizes"] not in ((1, 1), (1, 2)) and not (p["sequence_parallel"] and p["loss_parallel"]))
@pytest.mark.parametrize("loss_parallel", [True, False])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_greedy(pool, sizes, sequence_parallel, loss_parallel) -> None:
    options = {"sequence_parallel": sequence_parallel, "loss_parallel": loss_parallel}
    generated = pool(sizes[0] * sizes[1])(generate, sizes, prompt(), options, temperature=0)
    assert generated == greedy(prompt())


@pytest.mark.swept(lambda p: p["length"] in (2, 8))
@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_prompt_lengths(pool, length) -> None:
    assert pool(4)(generate, (1, 4), prompt(length), {}, temperature=0) == greedy(prompt(length))


@pytest.mark.parametrize("name", ["pythia-14m", "llama"])
def test_other_models(pool, name) -> None:
    assert pool(2)(generate, (1, 2), prompt(), {}, name, temperature=0) == greedy(prompt(), name=name)


def test_no_new_tokens(pool) -> None:
    assert pool(2)(generate, (1, 2), prompt(), {}, new=0) == prompt().tolist()


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_same_seed_same_sample_on_every_mesh(pool, sizes) -> None:
    expected = pool(1)(generate, (1, 1), prompt(), {}, seed=5, top_k=20)
    assert pool(sizes[0] * sizes[1])(generate, sizes, prompt(), {}, seed=5, top_k=20) == expected


def test_another_seed_gives_another_sample(pool) -> None:
    samples = [pool(2)(generate, (1, 2), prompt(), {}, seed=seed) for seed in (5, 6)]
    assert samples[0] != samples[1]


def generate_with_different_states() -> list[int]:
    torch.manual_seed(dist.get_rank())
    return generate((1, 2), prompt(), {})


def test_without_seed_ranks_agree(pool) -> None:
    pool(2)(generate_with_different_states)


def test_top_1_is_greedy(pool) -> None:
    assert pool(2)(generate, (1, 2), prompt(), {}, top_k=1) == greedy(prompt())


def test_top_k_above_the_vocabulary(pool) -> None:
    samples = [pool(2)(generate, (1, 2), prompt(), {}, seed=5, top_k=top_k) for top_k in (VOCABULARY, 10**6)]
    assert samples[0] == samples[1]


def test_low_temperature_is_greedy(pool) -> None:
    assert pool(2)(generate, (1, 2), prompt(), {}, temperature=1e-4) == greedy(prompt())


def test_stops_after_eos(pool) -> None:
    expected = greedy(prompt())
    eos = expected[PROMPT + 2]
    stop = expected.index(eos, PROMPT) + 1
    assert pool(2)(generate, (1, 2), prompt(), {}, temperature=0, eos_id=eos) == expected[:stop]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), r"shape \(n,\) with n > 0, and this one has the shape \(0,\)"),
        (torch.zeros(1, 4, dtype=torch.int64), r"shape \(n,\) with n > 0, and this one has the shape \(1, 4\)"),
        ([prompt(), "text"], "this one is 'text'"),
        ([], "There is no prompt"),
    ],
)
def test_wrong_prompt(tokens, message) -> None:
    with pytest.raises(ValueError, match=message):
        fabric_tp.generate(nn.Identity(), tokens, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1 must be at least 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \[0, 1\]"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ({"stop": [[]]}, "holds an empty sequence"),
        ({"compile": True}, "compile=True needs a cache with static shapes.*Identity"),
    ],
)
@pytest.mark.parametrize("function", [fabric_tp.generate, fabric_tp.generate_stream])
def test_wrong_options_are_refused_when_it_is_called(function, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        function(nn.Identity(), prompt(), **{"max_new_tokens": 3, **options})


def test_more_positions_than_the_model_has() -> None:
    with pytest.raises(ValueError, match=r"7 tokens and max_new_tokens=59 need 65 positions, and .* is 64"):
        fabric_tp.generate(build("Llama-3-8B"), prompt(), 59)
    assert len(fabric_tp.generate(build("Llama-3-8B"), prompt(), 58)) == 65


def with_different_prompts() -> None:
    fabric_tp.generate(parallelized((1, 2)), prompt(4 + dist.get_rank()), 2)


def test_different_prompts_are_refused(pool) -> None:
    with pytest.raises(AssertionError, match=r"Ranks \[1\] were given other prompts or options than rank 0"):
        pool(2)(with_different_prompts)


LENGTHS = (3, 7, 1)


def batch(sizes: tuple[int, int], name: str, how: dict[str, Any]) -> list[list[int]]:
    model = parallelized(sizes, name)
    return [tokens.tolist() for tokens in fabric_tp.generate(model, [prompt(n) for n in LENGTHS], NEW, **how)]


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2))
@pytest.mark.parametrize("name", ["Llama-3-8B", "llama"])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2), (1, 4)], ids=str)
def test_prompts_of_different_lengths(pool, sizes, name) -> None:
    generated = pool(sizes[0] * sizes[1])(batch, sizes, name, {"temperature": 0})
    assert generated == [greedy(prompt(length), name=name) for length in LENGTHS]


def test_each_prompt_of_a_batch_has_a_seed_of_its_own(pool) -> None:
    how = {"top_k": 20, "top_p": 0.9}
    alone = [pool(2)(generate, (1, 2), prompt(n), {}, seed=5 + i, **how) for i, n in enumerate(LENGTHS)]
    assert pool(2)(batch, (1, 2), "Llama-3-8B", {"seed": 5, **how}) == alone


def test_prompts_stop_one_by_one(pool) -> None:
    alone = [greedy(prompt(length)) for length in LENGTHS]
    stop = [alone[0][LENGTHS[0] + 2], alone[1][LENGTHS[1] + 4 : LENGTHS[1] + 6]]
    generated = pool(2)(batch, (1, 2), "Llama-3-8B", {"temperature": 0, "stop": stop})
    assert [len(tokens) for tokens in generated] < [len(tokens) for tokens in alone]
    for tokens, whole in zip(generated, alone, strict=True):
        assert tokens == whole[: len(tokens)]
    assert generated[0][-1] == stop[0]
    assert generated[1][-2:] == stop[1] or generated[1][-1] == stop[0]


def streamed() -> tuple[list[int], list[int], list[tuple[int, int]]]:
    model = parallelized((1, 2))
    whole = fabric_tp.generate(model, prompt(), NEW, temperature=0)[PROMPT:].tolist()
    one = list(fabric_tp.generate_stream(model, prompt(), NEW, temperature=0))
    several = list(fabric_tp.generate_stream(model, [prompt(), prompt(3)], NEW, temperature=0))
    return whole, one, several


def test_stream(pool) -> None:
    whole, one, several = pool(2)(streamed)
    assert one == whole
    assert [token for number, token in several if number == 0] == whole
    assert [number for number, _ in several] == [0, 1] * NEW


def withheld(include_eos: bool, stop: list[list[int]]) -> list[int]:
    return list(
        fabric_tp.generate_stream(
            parallelized((1, 2)), prompt(), NEW, temperature=0, stop=stop, include_eos=include_eos
        )
    )


@pytest.mark.parametrize("include_eos", [True, False])
def test_a_stream_can_leave_out_what_stops_it(pool, include_eos) -> None:
    new = greedy(prompt())[PROMPT:]
    stop = new[1:3]
    first = next(n for n in range(NEW) if new[n : n + 2] == stop)
    expected = new[: first + 2] if include_eos else new[:first]
    assert pool(2)(withheld, include_eos, [stop, [*new[:2], VOCABULARY]]) == expected
