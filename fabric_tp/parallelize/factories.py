"""What a user hands to ``TensorParallelStrategy(...)`` or ``ModelParallelStrategy(parallelize_fn=...)``.

Each factory is a dataclass: its options are its fields, documented at :class:`TransformerOptions` and
:class:`BlockOptions`, and an instance is the function that parallelizes a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from fabric_tp.architectures import FEED_FORWARD, LITGPT, LLAMA, Architecture, recognise
from fabric_tp.architectures.names import children, class_path, has
from fabric_tp.parallelize.decoding import decoding_plan
from fabric_tp.parallelize.options import documented
from fabric_tp.parallelize.parallelize import Derived, ParallelizeByPlan
from fabric_tp.plan import TransformerOptions, derive_feed_forward_plan, derive_plan, tied_parameters
from fabric_tp.plan.derive import BALANCE
from fabric_tp.styles import Style

TORCH_LEAN = "fabric_tp.architectures.lean:TORCH"

SPLITS = (
    "cuts the sequence after each rank has got its part of it, so pieces of different ranks would be put together."
    " Leave it out, and use fused_loss=True for less memory; or sequence_parallel=False."
)


@documented
@dataclass(frozen=True, kw_only=True)
class Parallelize(ParallelizeByPlan, TransformerOptions):
    """Parallelize a transformer of an architecture that you describe, or of a known one.

    :class:`litgpt`, :class:`llama` and :class:`auto` are this with a known architecture; or, with one of yours::

        fabric_tp.Parallelize(architecture=PARROT, sequence_parallel=False)
    """

    architecture: Architecture | None = None
    """What the model looks like; None recognises it."""
    verify: bool | None = None
    """Run the embedding, a block of each kind and the head once before and after the model is divided, on a small
    input, and compare; models on the meta device, and in ``check()``, on tensors without memory. By default models that
    are recognised by the names of their modules and not by a class that this package is tested with."""

    def derive(self, model: nn.Module, tensor_parallel_size: int) -> Derived:
        architecture = self.architecture or recognise(model)
        if architecture.block is None:
            return _derive_feed_forward(architecture, model, self.lean, tensor_parallel_size)
        options = self if self.activation_checkpointing == "none" else replace(self, regather=False)
        plan = derive_plan(architecture, model, options, tensor_parallel_size)
        # FSDP2 cannot shard a parameter in two places.
        ends = [] if tied_parameters(model) else architecture.ends
        return Derived(
            plan=plan,
            derived_from=architecture.description,
            blocks=list(children(model, architecture.blocks).values()),
            token_wise=_token_wise(architecture, model),
            samples_apart=class_path(model) in architecture.computes_samples_apart,
            ends=[[model.get_submodule(name) for name in names] for names in ends],
            lean=_lean(architecture) if self.lean else (),
            refused=dict.fromkeys(architecture.balances_experts, BALANCE)
            | dict.fromkeys(architecture.splits_sequence if self.sequence_parallel else (), SPLITS),
            decoding=decoding_plan(architecture, model, self, tensor_parallel_size),
            verify=_verify(self.verify, architecture, model),
        )


@documented
@dataclass(frozen=True, kw_only=True)
class litgpt(Parallelize):
    """Parallelize a ``litgpt.GPT`` or ``litgpt.lora.GPT``."""

    architecture: Architecture | None = field(default=LITGPT, init=False, repr=False)


@documented
@dataclass(frozen=True, kw_only=True)
class llama(Parallelize):
    """Parallelize a Llama in Meta's names: ``tok_embeddings``, ``layers.*.attention.wq``, ..., ``output``.

    ``layers`` may be a ModuleList or a ModuleDict.
    """

    architecture: Architecture | None = field(default=LLAMA, init=False, repr=False)


@documented
@dataclass(frozen=True, kw_only=True)
class auto(Parallelize):
    """Parallelize a model of any known architecture, recognised by the names of its modules.

    A model that is not recognised is a ValueError that says which are known.
    """

    architecture: Architecture | None = field(default=None, init=False, repr=False)


@documented
@dataclass(frozen=True, kw_only=True)
class feed_forward(ParallelizeByPlan):
    """Parallelize a SwiGLU MLP with layers ``w1``, ``w2`` and ``w3``, or a model made of such MLPs.

    Input and output are whole on every rank.
    """

    lean: bool = True
    """Compute norms so that less is kept for the backward, as in :class:`litgpt`."""

    def derive(self, model: nn.Module, tensor_parallel_size: int) -> Derived:
        return _derive_feed_forward(FEED_FORWARD, model, self.lean, tensor_parallel_size)


@documented
@dataclass(frozen=True)
class from_plan(ParallelizeByPlan):
    """Parallelize any module by a plan; whether sequence and loss are parallel is up to it."""

    own_plan: Mapping[str, ParallelStyle]
    """Styles of :mod:`fabric_tp.styles`, or torch's own, by name of the module; ``*`` stands for one part of a name
    (``"layers.*.attention.wq"``), and ``""`` for the model itself. Every parameter must be covered."""
    blocks: str | None = field(default=None, kw_only=True)
    """Name of the ModuleList or ModuleDict whose children are sharded by FSDP2, checkpointed and compiled one by one.
    Without it the model is taken as a whole."""

    def derive(self, model: nn.Module, tensor_parallel_size: int) -> Derived:
        if self.blocks and not has(model, self.blocks):
            raise ValueError(f"blocks={self.blocks!r} is not a module of the model.")
        foreign = sorted({type(style).__name__ for style in self.own_plan.values() if not isinstance(style, Style)})
        if self.compile and self.blocks and foreign:
            raise ValueError(
                f"compile=True of each of blocks={self.blocks!r} is not right with torch's own {', '.join(foreign)}:"
                " gradients of DTensors that leave a compiled block are lost or end in an error of torch. Use the"
                " styles of fabric_tp.styles, such as Colwise, Rowwise and Replicated; or leave out blocks, which"
                " compiles the model as a whole."
            )
        blocks = list(children(model, self.blocks).values()) if self.blocks else []
        return Derived(plan=dict(self.own_plan), blocks=blocks)


def _derive_feed_forward(
    architecture: Architecture, model: nn.Module, lean: bool, tensor_parallel_size: int
) -> Derived:
    plan = derive_feed_forward_plan(architecture, model, tensor_parallel_size)
    return Derived(plan=plan, derived_from=architecture.description, lean=_lean(architecture) if lean else ())


def _token_wise(architecture: Architecture, model: nn.Module) -> list[nn.Module]:
    """MLPs; none of a model that this package is not tested with."""
    if class_path(model) not in architecture.tested or architecture.block is None:
        return []
    name = architecture.block.feed_forward.name
    blocks = children(model, architecture.blocks).values()
    return [block.get_submodule(name) for block in blocks if name and has(block, name)]


def _verify(verify: bool | None, architecture: Architecture, model: nn.Module) -> Literal["no", "try", "must"]:
    if verify is None:
        return "no" if class_path(model) in architecture.tested else "try"
    return "must" if verify else "no"


def _lean(architecture: Architecture) -> tuple[str, ...]:
    return (TORCH_LEAN, architecture.lean) if architecture.lean else (TORCH_LEAN,)
