"""The caches of Transformers' models: whatever the model makes for itself when it is asked to."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fabric_tp.architectures.cache import Cache, refuse_static

CANNOT_CACHE = ("cpmant", "xlstm")
"""Types whose own ``generate``, in Transformers 5.3, ends in an error unless it computes the whole sequence each time:
one adds positions of fewer tokens than it has keys, the other has a state of another shape than its forward takes."""

NAMES = ("past_key_values", "cache_params", "state")
"""What models may call their cache."""


class TransformersCache(Cache):
    """Prompts are filled up on the left, as in Transformers' own ``generate``."""

    def prepare(self) -> None:
        refuse_static(self)
        self.takes = set(inspect.signature(self.model.forward).parameters)
        lengths = sorted(len(prompt) for prompt in self.prompts)
        if len(set(lengths)) > 1 and "attention_mask" not in self.takes:
            raise ValueError(
                f"{type(self.model).__name__} takes no attention_mask, so that prompts of different lengths, {lengths},"
                " cannot share a batch. Generate from one at a time."
            )

    def prefill(self) -> tuple[Tensor, Tensor]:
        self.tokens = _filled_on_the_left(self.prompts)
        mask = _filled_on_the_left([torch.ones_like(prompt) for prompt in self.prompts])
        self.state: dict[str, Any] = {"use_cache": can_cache(self.model)}
        if "attention_mask" in self.takes:
            self.state["attention_mask"] = mask
        if "position_ids" in self.takes:
            self.state["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in self.takes:
            self.state["logits_to_keep"] = 0  # all; some models cannot do without it
        self.state["cache_position"] = torch.arange(self.longest, device=mask.device)
        return self._forward(first=True)

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        return self._forward(first=False)

    def _forward(self, *, first: bool) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        cached = any(self.state.get(name) is not None for name in NAMES)  # some models have none
        inputs = model.prepare_inputs_for_generation(
            self.tokens, next_sequence_length=1 if cached else None, is_first_iteration=first, **self.state
        )
        output = self.call(**inputs, return_dict=True)
        # Not public, but what models override: cache, mask and positions for the next token.
        self.state = model._update_model_kwargs_for_generation(output, self.state)
        return output.logits, torch.full_like(self.lengths, output.logits.shape[1] - 1)


def can_cache(model: Any) -> bool:
    return model.config.model_type not in CANNOT_CACHE


def _filled_on_the_left(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side="left")
