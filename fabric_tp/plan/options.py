"""The options that decide how a transformer is split."""

from dataclasses import dataclass

from fabric_tp.autograd.collectives import Layout


@dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """How a transformer is split, whatever its architecture."""

    sequence_parallel: bool = True
    """Norms and residuals hold only this rank's part of the sequence. The same bytes on the wire, less memory. Any
    length will do; one that the ranks do not divide is filled up on the way, at the cost of copies."""
    regather: bool = True
    """With ``sequence_parallel``, keep only this rank's part of what is gathered before attention, MLP and head, and
    gather it again in the backward, beside the gradient of the input: two more gathers a layer, and ``4 s b h`` bytes
    less in 16 bits. Activation checkpointing gathers again anyway, and so does what it does."""
    loss_parallel: bool = True
    """Logits stay sharded over the vocabulary, for :func:`fabric_tp.cross_entropy`. Otherwise every rank gets all of
    them."""
    fused_loss: bool = False
    """The head leaves the logits to :func:`fabric_tp.cross_entropy`, which computes them a chunk at a time together
    with the loss, so that they are never whole. Anything else that looks at them gets them."""
    replicate_attention: bool = False
    """Every rank computes the whole attention; everything else is sharded. In models where convolutions, state spaces
    or linear attention stand in for attention, these are computed whole, which they need this for, and attention itself
    is split."""

    lean: bool = True
    """Compute norms, activations and attention so that less is kept for the backward, where that is exactly equivalent
    to the model's own modules: outputs of norms and of activations are made again, keys and values are not repeated for
    the query heads that share them, masks of sliding windows are made once for all layers."""


def layout_of(options: TransformerOptions) -> Layout:
    """Of the activations between the sharded parts. No property: command lines take those for commands."""
    return "sequence" if options.sequence_parallel else "replicate"
