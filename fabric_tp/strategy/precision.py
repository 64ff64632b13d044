"""Fabric's precision plugins without the copies that they make of the model's output."""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins import HalfPrecision, MixedPrecision, Precision


class ShardedMixedPrecision(Precision):
    """``"bf16-mixed"`` through FSDP2: it casts parameters block by block and reduces gradients in fp32.

    Autocast would cast each weight anew in every forward, and keep the copies for the backward.
    """

    precision = "bf16-mixed"


class HalfOutputPrecision(HalfPrecision):
    """``"bf16-true"`` and ``"16-true"`` whose logits stay as they are: the loss goes through fp32 in pieces."""

    def convert_output(self, data: Any) -> Any:
        return data


def without_copies(precision: Precision | None, *, shards_parameters: bool) -> Precision | None:
    """What takes the place of the plugin that Fabric chose.

    Args:
        precision: Fabric's plugin.
        shards_parameters: FSDP2 can be told to cast, since the model is parallelized by one of our factories.

    Raises:
        ValueError: It scales the loss for fp16.
    """
    if isinstance(precision, MixedPrecision):
        if precision.precision == "16-mixed":
            raise ValueError(
                "precision='16-mixed' scales the loss, and each rank would find overflows only in its own part of the"
                " gradients: some ranks would skip a step that others take. Use 'bf16-mixed', which needs no scaling."
            )
        return ShardedMixedPrecision() if shards_parameters else precision
    if type(precision) is HalfPrecision:
        return HalfOutputPrecision(precision.precision)
    return precision
