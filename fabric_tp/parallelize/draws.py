"""Random numbers that a model draws in its own forward: each rank would draw others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fabric_tp._torch import TorchDispatchMode
from fabric_tp.styles.random_module import Follower

Place = list[tuple[str, nn.Module]]
"""A module with those around it, the outermost first, by their names."""


class Draw(NamedTuple):
    at: Place
    operation: str


class Draws(TorchDispatchMode):
    """Within it operations that draw random numbers are recorded.

    Not those of a single number: it decides whether a whole layer is dropped, and is drawn even where none ever is.
    Their rates are in the description of an architecture, ``dropout_rates``.

    Args:
        at: Where the forward is; whoever calls it keeps this up to date.
    """

    def __init__(self, at: Place) -> None:
        super().__init__()
        self.at = at
        self.found: list[Draw] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = func(*args, **kwargs)
        is_random = torch.Tag.nondeterministic_seeded in func.tags and _rate(func, args, kwargs) != 0
        if is_random and not (isinstance(drawn, Tensor) and drawn.dim() == 0):
            self.found.append(Draw(list(self.at), func.overloadpacket.__name__))
        return drawn


def check_draws(draws: Sequence[Draw]) -> None:
    """After the model was divided.

    Raises:
        ValueError: A module draws, and neither it nor one around it has a style that makes ranks draw the same.
    """
    for draw in draws:
        if not any(isinstance(module, Follower) for _, module in draw.at):
            name, _ = draw.at[-1]
            raise ValueError(
                f"{name or 'The model'} draws random numbers in its forward ({draw.operation}), and each rank would"
                " draw others. Set what it needs them for to 0; an nn.Dropout is drawn the same on all ranks."
            )


def _rate(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Of dropout inside an attention kernel, which is called with 0 where there is none; 1 for what has no rate."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return kwargs.get(argument.name, args[i] if i < len(args) else argument.default_value)
    return 1
