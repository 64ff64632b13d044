"""Continuing prompts, a token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_tp.architectures.cache import Cache, cache_class
from fabric_tp.generation.decoding import decoding, tensor_parallel_size
from fabric_tp.generation.prompts import Stop, check_prompts, common_seed, stop_sequences
from fabric_tp.generation.sampling import Sampling
from fabric_tp.generation.stopping import Continuation, Stopping
from fabric_tp.parallelize.compiled import compiled_blocks, computed_by, for_each_shape, own_forward
from fabric_tp.wrapping import unwrapped


def generate(
    model: nn.Module,
    tokens: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_id: int | None = None,
    stop: Stop = (),
    include_eos: bool = True,
    compile: bool = False,
) -> Any:
    """Continue prompts, the same on every rank; all ranks must call it, with the same arguments.

    Models of litgpt and Transformers keep keys and values of what they have seen, each rank those of its heads; other
    models compute the whole sequence again for each token. Sequence parallelism is off meanwhile, and prompts may have
    any length. Afterwards the model is as it was.

    Args:
        model: Maps tokens ``(b, s)`` to logits ``(b, s, v)``, sharded over the vocabulary or not; parallelized or not.
        tokens: A prompt, ``(n,)``, or a list of prompts of any lengths, which are continued side by side.
        max_new_tokens: How many tokens to add at most to each.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Choose among so many of the likeliest tokens only.
        top_p: Of these, choose among the likeliest that together have this probability; 0 takes the likeliest token.
        seed: Of the choice; None takes the state of torch's generator of the first rank. The second of several prompts
            is continued as if it were the only one and ``seed + 1`` given, and so on.
        eos_id: Stop after this token.
        stop: Stop after any of these tokens, or sequences of tokens, as litgpt's prompt styles name them.
        include_eos: Whether the result holds what it stopped after.
        compile: Compile the blocks of the model for one new token: once for all positions, and again for twice as many.
            For litgpt's models.

    Returns:
        A tensor of prompt and continuation, ``(n + new,)``; a list of them for a list of prompts.

    Raises:
        ValueError: A prompt is not a tensor ``(n,)`` of at least one token; an option is out of its range; the model
            has not so many positions; ranks were given different things, if they meet each other at all.

    Example::

        tokens = fabric_tp.generate(model, tokenizer.encode("def ", device=fabric.device), 64, temperature=0.8)
    """
    prompts = check_prompts(tokens)
    new: list[list[int]] = [[] for _ in prompts]
    for prompt, token in generate_stream(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=eos_id,
        stop=stop,
        include_eos=include_eos,
        compile=compile,
    ):
        new[prompt].append(token)
    whole = [torch.cat([prompt, prompt.new_tensor(more)]) for prompt, more in zip(prompts, new, strict=True)]
    return whole[0] if isinstance(tokens, Tensor) else whole


def generate_stream(
    model: nn.Module,
    tokens: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_id: int | None = None,
    stop: Stop = (),
    include_eos: bool = True,
    compile: bool = False,
) -> Iterator[Any]:
    """As :func:`generate`, giving out each new token when it is there.

    All ranks must take all tokens, or stop after the same. Until they did, or called ``close()``, the model can do
    nothing else.

    Returns:
        The new tokens of a prompt; of a list of prompts, pairs of the prompt's number, from 0, and its next token. What
        may be the beginning of a stop sequence waits, with ``include_eos=False``, until it is known not to be.

    Raises:
        ValueError: As :func:`generate`, when it is called.

    Example::

        for token in fabric_tp.generate_stream(model, prompt, 64, eos_id=tokenizer.eos_id, include_eos=False):
            fabric.print(tokenizer.decode(torch.tensor([token])), end="", flush=True)
    """
    prompts = check_prompts(tokens)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    sampling.check()
    stopping = Stopping(stop_sequences(stop, eos_id), include_eos)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0.")
    cache = cache_class(unwrapped(model))(unwrapped(model), model, prompts, max_new_tokens, static=compile)
    first = common_seed(prompts, (max_new_tokens, sampling, stopping, compile), seed)
    generators = [torch.Generator().manual_seed(first + number) for number in range(len(prompts))]
    pairs = _tokens(cache, max_new_tokens, sampling, generators, [Continuation(stopping) for _ in prompts])
    return (token for _, token in pairs) if isinstance(tokens, Tensor) else pairs


@torch.no_grad()
def _tokens(
    cache: Cache,
    max_new_tokens: int,
    sampling: Sampling,
    generators: list[torch.Generator],
    continuations: list[Continuation],
) -> Iterator[tuple[int, int]]:
    if not max_new_tokens:
        return
    with decoding(cache.call), computed_by(compiled_blocks(cache.model), own_forward), closing(cache):
        logits, index = cache.prefill()
        with _compiled(cache) if cache.static else nullcontext():
            for left in reversed(range(max_new_tokens)):
                tokens = sampling.choose(logits, index, generators)
                chosen = _of_first_replica(cache.prompts[0].new_tensor(tokens), cache.model)
                for number, (token, continuation) in enumerate(zip(chosen.tolist(), continuations, strict=True)):
                    if not continuation.stopped:
                        yield from ((number, each) for each in continuation.add(token, last=not left))
                if all(continuation.stopped for continuation in continuations):
                    return
                logits, index = cache.step(chosen)


def _compiled(cache: Cache) -> AbstractContextManager[None]:
    """Each block is compiled for one new token; on a GPU as a CUDA graph."""
    return computed_by(cache.blocks, for_each_shape("reduce-overhead" if cache.lengths.is_cuda else None))


def _of_first_replica(tokens: Tensor, model: nn.Module) -> Tensor:
    """Of data-parallel ranks, which compute the same, each by itself: kernels may sum in another order each time."""
    if dist.is_initialized() and dist.get_world_size() > tensor_parallel_size(model):
        dist.broadcast(tokens, 0)
    return tokens
