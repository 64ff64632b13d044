"""The tensors of a model, parallelized or not, by the names that the model had before it was parallelized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_tp.architectures import LITGPT
from fabric_tp.shards import gather_shards, own_region
from fabric_tp.styles.fused_colwise import FusedPart, fused_parameters
from fabric_tp.styles.low_rank_colwise import DOWN, UP
from fabric_tp.styles.quantized import QuantizedWeight, quantized_weights
from fabric_tp.wrapping import unwrapped


class Part(NamedTuple):
    """A parameter or buffer, and where it lies in the tensor that it is a part of."""

    name: str
    """In the parallelized model."""
    tensor: Tensor
    dim: int
    start: int
    quantized: QuantizedWeight | None = None
    """What holds the values, if the tensor does not: it is on the meta device then."""

    @property
    def local(self) -> Tensor:
        """What this rank has of it; of a quantized weight, a copy."""
        tensor = self.quantized.parameter() if self.quantized else self.tensor
        return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.data

    @contextmanager
    def filled(self) -> Iterator[Tensor]:
        """What this rank has of it, to be given its values."""
        if self.quantized is None:
            yield self.local
            return
        like = self.tensor._local_tensor if isinstance(self.tensor, DTensor) else self.tensor
        local = torch.empty_like(like, device=self.quantized.device)
        yield local
        self.quantized.store(local)

    def gather(self) -> Tensor:
        """All of it on every rank; all ranks must call this."""
        return gather_shards(self.quantized.parameter() if self.quantized else self.tensor)

    @property
    def region(self) -> tuple[slice, ...]:
        """Where this lies in the tensor that it is a part of."""
        region = list(own_region(self.tensor))
        if self.start:
            own = region[self.dim]
            region[self.dim] = slice(self.start + own.start, self.start + own.stop)
        return tuple(region)


class Whole(NamedTuple):
    """A tensor of the model before it was parallelized; its parts lie one after the other."""

    parts: list[Part]

    @property
    def shape(self) -> torch.Size:
        last = self.parts[-1]
        shape = list(last.tensor.shape)
        if shape:
            shape[last.dim] += last.start
        return torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].tensor.dtype

    def gather(self) -> Tensor:
        """All of it on every rank; all ranks must call this."""
        parts = [part.gather() for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.parts[0].dim)


def whole_tensors(model: nn.Module) -> dict[str, Whole]:
    """All that a state dict has, in its order, and what is quantized."""
    model = unwrapped(model)
    result: dict[str, Whole] = {}
    fused = fused_parameters(model)
    quantized = quantized_weights(model)
    tensors = model.state_dict(keep_vars=True) | {name: weight.like for name, weight in quantized.items()}
    for name, tensor in tensors.items():
        of = fused.get(name, FusedPart(name, 0))
        parts = result.setdefault(of.whole, Whole([])).parts
        start = sum(part.tensor.shape[of.dim] for part in parts)
        parts.append(Part(name, tensor, of.dim, start, quantized.get(name)))
    return result


def without_adapters(wholes: Mapping[str, Whole]) -> dict[str, Whole]:
    """Without low-rank adapters, by the keys that a model has which never had any."""
    bases = LITGPT.adapter_bases
    return {
        ".".join(part for part in name.split(".") if part not in bases): whole
        for name, whole in wholes.items()
        if not is_adapters(name)
    }


def is_adapters(name: str) -> bool:
    return name.rpartition(".")[2] in (DOWN, UP)


def wanted_of(model: nn.Module, found: Iterable[str]) -> dict[str, Whole]:
    """The tensors to read, where these are found; adapters stay what they are, if there are none of them."""
    wholes = whole_tensors(model)
    return without_adapters(wholes) if _has_adapters(wholes) and not _has_adapters(found) else wholes


def _has_adapters(names: Iterable[str]) -> bool:
    return any(is_adapters(name) or set(name.split(".")) & set(LITGPT.adapter_bases) for name in names)


def check_names(path: object, missing: set[str], unexpected: set[str]) -> None:
    if missing or unexpected:
        raise ValueError(
            f"{str(path)!r} does not fit the model: it lacks {len(missing)} keys, such as {sorted(missing)[:3]}, and"
            f" has {len(unexpected)} that the model does not, such as {sorted(unexpected)[:3]}."
        )


def check_shape(path: object, name: str, found: torch.Size, wanted: torch.Size) -> None:
    if found != wanted:
        raise ValueError(f"{name} has the shape {tuple(found)} in {str(path)!r}, the model's {tuple(wanted)}.")
