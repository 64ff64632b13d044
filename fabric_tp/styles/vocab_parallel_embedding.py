from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from fabric_tp import _torch
from fabric_tp.autograd.collectives import SEQUENCE_DIM, Layout, reduce, reduce_scatter
from fabric_tp.styles.layout import divide_sequence
from fabric_tp.styles.style import LocalModule, Parallelized, Style


class _VocabParallelEmbedding(LocalModule):
    padding_idx: int | None
    vocabulary: int
    """v, which the ranks need not divide."""

    def compute(self, tokens: Tensor) -> Tensor:
        """The module's own forward, which may scale what it looks up, on the tokens of this rank's rows."""
        this, weight = self.parallelized, self.weight
        assert isinstance(weight, Tensor)
        rows = weight.shape[0]
        first = this.group.rank * -(-self.vocabulary // this.group.size)
        check_tokens(tokens, self.vocabulary)
        if this.group.size == 1:
            return super().compute(tokens)
        local = tokens - first
        elsewhere = (local < 0) | (local >= rows)
        padding = self.padding_idx
        mine = padding is not None and first <= padding < first + rows
        self.padding_idx = padding - first if mine else None  # type: ignore[operator]
        try:
            embedded = super().compute(local.masked_fill(elsewhere, 0))
        finally:
            self.padding_idx = padding
        return embedded.masked_fill(elsewhere.unsqueeze(-1), 0)


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """A token that no rank holds would be embedded as zeros, silently."""
    message = f"Token indices must lie in [0, {vocabulary})"
    if _torch.is_fake(tokens):
        return
    if tokens.device.type == "cpu":
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise ValueError(f"{message}, but range from {int(tokens.min())} to {int(tokens.max())}.")
    else:
        _torch.assert_on_device(((tokens >= 0) & (tokens < vocabulary)).all(), f"{message}.")


class VocabParallelEmbedding(Style):
    """An embedding split by rows of the vocabulary: each rank looks up its own tokens, the others' are zero.

    A subclass of ``nn.Embedding`` computes with its own forward, which must treat each token by itself: Gemma 3's
    multiplies with the root of the width.

    Args:
        output_layout: ``"replicate"``: the whole output on every rank. ``"sequence"``: each rank its part.

    With the tokens for x:

    ===============  ======  ========  ===========  ==============  ==========
    output_layout    x       weight    y            forward         backward
    ===============  ======  ========  ===========  ==============  ==========
    ``"replicate"``  (b, s)  (v/t, h)  (b, s, h)    all-reduce
    ``"sequence"``   (b, s)  (v/t, h)  (b, s/t, h)  reduce-scatter  all-gather
    ===============  ======  ========  ===========  ==============  ==========

    Raises:
        ValueError: The module is no ``nn.Embedding``, or one with ``max_norm``, ``scale_grad_by_freq`` or ``sparse``;
            a token is not in the vocabulary; the vocabulary is so small that it leaves nothing for the last rank.

    Example::

        plan = {"embed_tokens": VocabParallelEmbedding("sequence"), "layers.*.input_norm": Replicated("sequence")}
    """

    module_class = _VocabParallelEmbedding
    rounds_up = True

    def __init__(self, output_layout: Layout = "replicate") -> None:
        self.output_layout = output_layout

    def validate(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Embedding):
            raise ValueError(
                f"VocabParallelEmbedding takes a torch.nn.Embedding, and this is a {type(module).__name__}."
            )
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise ValueError(f"VocabParallelEmbedding does not support {option}={getattr(module, option)}.")

    def placements(self, module: nn.Module) -> Mapping[str, Placement]:
        return {"weight": Shard(0)}

    def prepare(self, module: nn.Module, this: Parallelized) -> None:
        module.vocabulary = module.get_parameter("weight").shape[0]  # type: ignore[assignment]

    def enter(self, this: Parallelized, x: Tensor) -> Tensor:
        if self.output_layout == "sequence":
            divide_sequence(this, x.shape[SEQUENCE_DIM])
        return x

    def leave(self, this: Parallelized, y: Tensor) -> Tensor:
        return reduce_scatter(y, this.group) if self.output_layout == "sequence" else reduce(y, this.group)

    def collectives(self) -> tuple[str, str]:
        return ("reduce-scatter", "all-gather") if self.output_layout == "sequence" else ("all-reduce", "")
