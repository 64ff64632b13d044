from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fabric_tp.autograd.collectives import SEQUENCE_DIM, Layout
from fabric_tp.autograd.dropout import dropout
from fabric_tp.styles.random_module import Follower
from fabric_tp.styles.style import Parallelized, Style


class _Dropout(Follower):
    parallelized: Parallelized[Dropout]

    def compute(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.training and self.p else super().compute(x)

    @torch.compiler.disable
    def drop(self, x: Tensor) -> Tensor:
        style, group = self.parallelized.style, self.parallelized.group
        shard_dim = style.shard_dim(x) if group.size > 1 else None
        mask = self.followed().mask(self.name_in_model, float(self.p), x, shard_dim, group.rank)  # type: ignore[arg-type]
        return dropout(x, mask, inplace=bool(self.inplace))


class Dropout(Style):
    """An ``nn.Dropout`` that drops the same elements of the same samples on every mesh.

    Ranks that hold the same elements drop the same of them, and ranks that hold different ones have their part of one
    mask. It depends on the seed, the name of the module, how often it was called before in the same forward, the number
    of the sample in the run (``autograd/run_position.py``) and the place in the sample: not on the mesh, on sequence
    parallelism, on how a batch is split into micro-batches, or on activation checkpointing. Where dim 0 is not the
    batch, as in mixtures of experts, it depends on the data-parallel rank and the micro-batch too.

    Args:
        layout: How the input lies. ``"replicate"``: whole on every rank. ``"sequence"``: each rank has its part.
            ``"features"``: each rank has its features or, with four dimensions, its heads.
        reduced_features: With ``"features"``: an input with so many of them is what the row-wise layer of the same
            module made of the shards, and lies as ``reduced_layout``. For a module with one ``nn.Dropout`` for both.
        reduced_layout: As ``layout``.

    ===============  ================  ===============  ==============  ==============  =======  ========
    layout           reduced_features  reduced_layout   x               y               forward  backward
    ===============  ================  ===============  ==============  ==============  =======  ========
    ``"replicate"``  ``None``          ``"replicate"``  (b, s, h)       (b, s, h)
    ``"sequence"``   ``None``          ``"replicate"``  (b, s/t, h)     (b, s/t, h)
    ``"features"``   ``None``          ``"replicate"``  (b, s, f/t)     (b, s, f/t)
    ``"features"``   ``None``          ``"replicate"``  (b, n/t, s, s)  (b, n/t, s, s)
    ``"features"``   ``h``             ``"sequence"``   (b, s/t, h)     (b, s/t, h)
    ===============  ================  ===============  ==============  ==============  =======  ========

    Raises:
        ValueError: The module is no ``nn.Dropout``, or the layout is not known; when it is called in training: nobody
            told it the seed.

    Example::

        plan = {"mlp.up": Colwise(), "mlp.dropout": Dropout("features"), "mlp.down": Rowwise()}
    """

    module_class = _Dropout

    def __init__(
        self,
        layout: Layout | Literal["features"] = "replicate",
        *,
        reduced_features: int | None = None,
        reduced_layout: Layout = "replicate",
    ) -> None:
        if layout not in ("replicate", "sequence", "features"):
            raise ValueError(f"layout={layout!r} is not known; it must be one of 'replicate', 'sequence', 'features'.")
        self.layout = layout
        self.reduced_features, self.reduced_layout = reduced_features, reduced_layout

    def validate(self, module: nn.Module) -> None:
        if not is_dropout(module):
            raise ValueError(f"Dropout takes a torch.nn.Dropout, and this is a {type(module).__name__}.")

    def shard_dim(self, x: Tensor) -> int | None:
        """The dimension of ``x`` of which each rank has a part."""
        if self.layout == "features" and x.dim() == 4:
            return 1
        reduced = self.layout == "features" and x.shape[-1] == self.reduced_features
        layout = self.reduced_layout if reduced else self.layout
        return {"replicate": None, "sequence": SEQUENCE_DIM, "features": x.dim() - 1}[layout]


def is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and type(module).forward is nn.Dropout.forward
