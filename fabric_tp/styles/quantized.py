"""Frozen weights that are stored in four bits (QLoRA, Dettmers et al., 2023, arXiv:2305.14314, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_tp.architectures.linear import storage
from fabric_tp.styles.style import LocalModule

Quantization = Literal["bnb.nf4", "bnb.fp4"]
"""By litgpt's names."""

BLOCK = 64
"""Numbers, one after the other in a rank's rows, that have one scale: their greatest absolute value, in fp32."""


class QuantizedWeight:
    """What stands in the place of a linear layer's frozen weight: this rank's part, in four bits a number.

    Called, it gives the values that the forward computes with; nobody keeps them. Ranks have the same values as one
    device where :data:`BLOCK` divides the columns that each stores.

    Args:
        parameter: The weight: a DTensor with values, or on the meta device, to be given some by :meth:`store`.
        kind: Of the four bits.
        computed_dtype: Of the values that the forward gets.
        localize: What of this rank's part the forward is to see.
    """

    def __init__(
        self, parameter: Tensor, kind: Quantization, computed_dtype: torch.dtype, localize: Callable[[Tensor], Tensor]
    ) -> None:
        local = parameter.detach()
        self.like = local.to("meta")
        """Shape, dtype, and how it is split."""
        self.shape, self.dtype, self.device = local.shape, local.dtype, local.device
        self._kind, self._computed_dtype, self._localize = kind, computed_dtype, localize
        self._local_shape = _local(local).shape
        if not local.is_meta:
            self.store(_local(local))

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    def store(self, local: Tensor) -> None:
        """Take the values of this rank's part."""
        from bitsandbytes.functional import quantize_4bit

        quant_type = self._kind.removeprefix("bnb.")
        self._packed, self._state = quantize_4bit(local.contiguous(), blocksize=BLOCK, quant_type=quant_type)
        self._state.dtype, self.device = self._computed_dtype, local.device

    def local(self) -> Tensor:
        """The values of this rank's part, as they were rounded, in the dtype that is computed in."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self._packed, self._state).view(self._local_shape)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self._localize(self.local())

    def t(self) -> Callable[[], Tensor]:
        return lambda: self().t()

    def parameter(self) -> nn.Parameter:
        """One with the values that it has, in the dtype and split as it was."""
        local, like = self.local().to(self.dtype), self.like
        if not isinstance(like, DTensor):
            return nn.Parameter(local, requires_grad=False)
        shape, stride = like.shape, like.stride()
        whole = DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
        )
        return nn.Parameter(whole, requires_grad=False)

    def tensors(self) -> Iterator[Tensor]:
        """All that it keeps in memory."""
        if not self.is_meta:
            yield from (self._packed, self._state.absmax, self._state.code)


def quantize(blocks: Iterable[nn.Module], kind: Quantization, dtype: torch.dtype | None) -> None:
    """Put a :class:`QuantizedWeight` in the place of each weight that :func:`quantizable` finds in parallelized blocks.

    Args:
        dtype: That is computed in; None: each weight's own.
    """
    for block in blocks:
        for module in block.modules():
            if not isinstance(module, LocalModule) or module.parallelized.storage is None:
                continue
            weights = {
                prefix: (holder, weight)
                for prefix, holder in module.holders().items()
                if (weight := holder._parameters.get("weight")) is not None
            }
            if any(weight.requires_grad for _, weight in weights.values()):
                continue
            for prefix, (holder, weight) in weights.items():
                del holder._parameters["weight"]
                name = f"{prefix}weight"
                module.parallelized.partial -= {name}  # it has no gradient
                localize = _localize(module, name)
                quantized = QuantizedWeight(weight, kind, dtype or weight.dtype, localize)
                holder.weight = quantized  # type: ignore[assignment]


def _localize(module: LocalModule, name: str) -> Callable[[Tensor], Tensor]:
    return lambda local: module.localize(name, local)


def quantizable(blocks: Iterable[nn.Module]) -> list[Tensor]:
    """The frozen weights of linear layers in the blocks of a model that is not parallelized yet."""
    modules = (module for block in blocks for module in block.modules() if storage(module) is not None)
    return [weight for module in modules if not (weight := module.get_parameter("weight")).requires_grad]


def check_quantization(blocks: Iterable[nn.Module], kind: Quantization) -> None:
    """Find out whether there is something to quantize, and something to do it with.

    Raises:
        ValueError: There is not.
    """
    if not quantizable(blocks):
        raise ValueError(
            f"quantize={kind!r} is for frozen weights, and no linear layer in the blocks of this model has one. Freeze"
            " what is not to be trained before the model is set up: litgpt.lora.mark_only_lora_as_trainable(model)."
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"quantize={kind!r} needs bitsandbytes, which is not installed: pip install bitsandbytes.")


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """By the name of the parameter in whose place it stands."""
    return {
        f"{name}.weight" if name else "weight": weight
        for name, module in model.named_modules()
        if isinstance(weight := module.__dict__.get("weight"), QuantizedWeight)
    }


def dequantize(model: nn.Module) -> None:
    """Make parameters of the weights that were quantized, as they were before, with the values that are left of them.

    So that a checkpoint can be read into them, or adapters merged. FSDP2 does not shard them.

    Example::

        fabric_tp.dequantize(model)
        fabric_tp.checkpoint.load(model, "checkpoints/meta-llama/Llama-3.2-1B")  # what was lost by rounding
        fabric_tp.checkpoint.litgpt.merge_adapters(model, unparallelized)
    """
    for name, quantized in quantized_weights(model).items():
        holder = model.get_submodule(name.rpartition(".")[0])
        del holder.weight
        holder.register_parameter("weight", quantized.parameter())


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
