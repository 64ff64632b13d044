"""Whether modules that every rank holds whole see what their styles say: the whole sequence, or a part of it.

Output cannot tell, since they treat each token by itself; but the gradients of their parameters would be sums that are
never made, or made of what is whole.
"""

from __future__ import annotations

import torch
from torch import nn

from fabric_tp.styles import Replicated
from fabric_tp.styles.style import LocalModule

Shapes = dict[nn.Module, torch.Size]
"""Of what modules gave."""


def check_layouts(model: nn.Module, whole: Shapes, divided: Shapes) -> None:
    """After the model was divided; ``whole`` is from before.

    Raises:
        ValueError: A module sees something else than its style says.
    """
    for name, module in model.named_modules():
        style = module.parallelized.style if isinstance(module, LocalModule) else None
        if not isinstance(style, Replicated) or module not in divided or module not in whole:
            continue
        if style.layout == "replicate" and style.partial_gradient:  # single heads, say, of which a rank has some
            continue
        sees = "replicate" if divided[module] == whole[module] else "sequence"
        if sees != style.layout:
            parts = {"replicate": "the whole sequence", "sequence": "a part of the sequence"}
            raise ValueError(
                f"{name} sees {parts[sees]} on each rank, and its style is {style!r}: its gradient would be wrong. The"
                " model computes it at another place than its description says, such as after the blocks and not before"
                " them. Describe it by an Architecture of your own (fabric_tp/architectures/README.md), or use"
                " sequence_parallel=False."
            )
