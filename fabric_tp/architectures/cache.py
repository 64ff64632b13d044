"""What a model keeps of the tokens that it has seen, so that each new one costs one token's computation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fabric_tp.architectures.names import by_class

CACHES = {
    "litgpt.model.GPT": "fabric_tp.architectures.litgpt.cache:LitGPTCache",
    "transformers.modeling_utils.PreTrainedModel": "fabric_tp.architectures.huggingface.cache:TransformersCache",
}
"""By the class, or one that it inherits from, where its cache is, as ``"package.module:NAME"``."""


class Cache(ABC):
    """Of one batch of prompts. The model is as it was before the first forward, and after :meth:`close`.

    Args:
        model: The model itself.
        call: The same, or what Fabric has put around it.
        prompts: Each ``(n,)``, of any lengths.
        max_new_tokens: How many tokens are added at most.
        static: Shapes stay the same from step to step, for the compiler.

    Raises:
        ValueError: So many tokens are too many for the model, or it has no cache of this kind.
    """

    blocks: Sequence[nn.Module] = ()
    """What is compiled one by one, if shapes are static."""

    def __init__(
        self,
        model: nn.Module,
        call: nn.Module,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        *,
        static: bool = False,
    ) -> None:
        self.model, self.call, self.prompts, self.static = model, call, prompts, static
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
        self.longest = int(self.lengths.max())
        self.length = self.longest + max_new_tokens
        self.prepare()

    def prepare(self) -> None:  # noqa: B027
        """What a kind of cache does before the first forward, which must not change the model.

        Raises:
            ValueError: As the class.
        """

    @abstractmethod
    def prefill(self) -> tuple[Tensor, Tensor]:
        """See all prompts.

        Returns:
            Logits ``(b, s, v)``, and which of the s is the last of each prompt, ``(b,)``.
        """

    @abstractmethod
    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See one more token of each, ``(b,)``; returns as :meth:`prefill`."""

    def close(self) -> None:  # noqa: B027
        """Leave the model as it was."""


class NoCache(Cache):
    """The whole sequences again for each token: a causal model does not see what comes later."""

    def prepare(self) -> None:
        refuse_static(self)

    def prefill(self) -> tuple[Tensor, Tensor]:
        self.padded = self.prompts[0].new_zeros(len(self.prompts), self.length)
        for row, prompt in zip(self.padded, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        self.ends = self.lengths - 1
        return self.logits()

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.ends = self.ends + 1
        self.padded[torch.arange(len(tokens), device=tokens.device), self.ends] = tokens
        return self.logits()

    def logits(self) -> tuple[Tensor, Tensor]:
        output = self.call(self.padded)
        return getattr(output, "logits", output), self.ends


def refuse_static(cache: Cache) -> None:
    """
    Raises:
        ValueError: Static shapes are asked for.
    """
    if cache.static:
        raise ValueError(
            "compile=True needs a cache with static shapes, which there is for litgpt's models, and this is a"
            f" {type(cache.model).__name__}. Use compile=False."
        )


def cache_class(model: nn.Module) -> type[Cache]:
    """The kind of cache of a model, parallelized or not."""
    return by_class(CACHES, model) or NoCache
