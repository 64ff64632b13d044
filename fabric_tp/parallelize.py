"""The factories: what a user hands to ``ModelParallelStrategy(parallelize_fn=...)``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fabric_tp import _torch
from fabric_tp.architectures import FEED_FORWARD, KNOWN, LITGPT, LLAMA, Architecture
from fabric_tp.architectures.architecture import children, has
from fabric_tp.derive import Options, derive_plan, make_lean
from fabric_tp.plan import Plan, apply_plan, check_plan, table, tied_parameters
from fabric_tp.random import broadcast, initialize, shared_seed
from fabric_tp.styles import VocabParallelEmbedding
from fabric_tp.styles.compiled import compile_block
from fabric_tp.styles.dropout import follow_run, has_followers
from fabric_tp.styles.embedding import check_sequence_length
from fabric_tp.styles.partial import PartialGradients
from fabric_tp.styles.recompute import kept_reductions

ActivationCheckpointing = Literal["none", "full", "selective"]
MixedPrecision = Literal["bf16-mixed"]
Model = TypeVar("Model", bound=nn.Module)

DATA_PARALLEL, TENSOR_PARALLEL = "data_parallel", "tensor_parallel"


@dataclass(frozen=True, kw_only=True)
class Parallelize:
    """Parallelizes a model over Fabric's ("data_parallel", "tensor_parallel") mesh.

    Made by :func:`litgpt`, :func:`llama`, :func:`feed_forward`, :func:`from_plan` and :func:`auto`.
    """

    architecture: Architecture | None = None
    """What the model looks like; None recognises it."""
    own_plan: Mapping[str, ParallelStyle] | None = None
    """The plan itself, instead of one derived from an architecture."""
    blocks: str | None = None
    """Name of the ModuleList or ModuleDict whose children FSDP2, checkpointing and compile take one by one."""
    sequence_parallel: bool = True
    regather: bool = True
    loss_parallel: bool = True
    fused_loss: bool = False
    replicate_attention: bool = False
    lean: bool = True
    activation_checkpointing: ActivationCheckpointing = "none"
    compile: bool = False
    mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        _check_choice("activation_checkpointing", self.activation_checkpointing, ("none", "full", "selective"))
        if not isinstance(self.mixed_precision, MixedPrecisionPolicy):
            _check_choice("mixed_precision", self.mixed_precision, (None, "bf16-mixed"))

    def __call__(self, model: Model, device_mesh: DeviceMesh) -> Model:
        """Parallelize ``model`` in place: its parameters become DTensors on this rank's device, initialised if on meta.

        Raises:
            ValueError: See :meth:`check`.
        """
        mesh = _axis(device_mesh, TENSOR_PARALLEL)
        assert mesh is not None
        plan = self.plan(model, tensor_parallel_size=mesh.size())
        device = _device(device_mesh)
        _synchronise(model, device_mesh, device)
        if self.lean and self.own_plan is None:
            make_lean(model, self._architecture(model).lean)
        apply_plan(plan, model, mesh)
        blocks = self._blocks(model)
        self._checkpoint_or_compile(blocks)
        self._fully_shard(model, blocks, _axis(device_mesh, DATA_PARALLEL))
        if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
            initialize(model, device, shared_seed(device_mesh))
        PartialGradients(model, mesh)
        if has_followers(model):
            follow_run(model, device_mesh, shared_seed(device_mesh))
        if self.own_plan is None and self.sequence_parallel and mesh.size() > 1:
            refused = partial(_refuse_arguments, self._architecture(model).splits_sequence)
            model.register_forward_pre_hook(refused, with_kwargs=True)
        if device_mesh.ndim > 1:
            _torch.flatten(device_mesh)
        return model

    def plan(self, model: nn.Module, *, tensor_parallel_size: int) -> Plan:
        """The style of each module, by name pattern; checked as in :meth:`check`."""
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size={tensor_parallel_size} must be at least 1.")
        plan = self._plan(model, tensor_parallel_size)
        described = "" if self.own_plan is not None else self._architecture(model).description
        check_plan(plan, model, tensor_parallel_size, described)
        return plan

    def check(self, model: nn.Module, *, tensor_parallel_size: int, sequence_length: int | None = None) -> None:
        """Find out whether the model can be parallelized so, without processes or memory (a meta model will do).

        Raises:
            ValueError: The model is not of the architecture; a plan key matches nothing; a parameter is covered by no
                style; heads, widths or the sequence length cannot be divided, with what works.
        """
        plan = self.plan(model, tensor_parallel_size=tensor_parallel_size)
        splits_sequence = any(
            isinstance(style, VocabParallelEmbedding) and style.output_layout == "sequence" for style in plan.values()
        )
        if sequence_length is not None and splits_sequence:
            check_sequence_length(sequence_length, tensor_parallel_size)

    def explain(self, model: nn.Module, *, tensor_parallel_size: int, data_parallel_size: int = 1) -> str:
        """A table of module, style, parameter shape whole and per rank, and collectives of forward and backward.

        Needs no process group; for a model on the meta device, no memory either.
        """
        plan = self.plan(model, tensor_parallel_size=tensor_parallel_size)
        sizes = {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
        return table(plan, model, **sizes)

    def _plan(self, model: nn.Module, tensor_parallel_size: int) -> Plan:
        if self.own_plan is not None:
            return dict(self.own_plan)
        options = Options(
            tensor_parallel_size=tensor_parallel_size,
            sequence_parallel=self.sequence_parallel,
            regather=self.regather and self.activation_checkpointing == "none",
            loss_parallel=self.loss_parallel,
            fused_loss=self.fused_loss,
            replicate_attention=self.replicate_attention,
        )
        return derive_plan(self._architecture(model), model, options)

    def _architecture(self, model: nn.Module) -> Architecture:
        return self.architecture or recognise(model)

    def _blocks(self, model: nn.Module) -> list[nn.Module]:
        path = self.blocks if self.own_plan is not None else self._architecture(model).blocks
        if path and not has(model, path):
            raise ValueError(f"blocks={path!r} is not a module of the model.")
        return list(children(model, path).values()) if path else [model]

    def _checkpoint_or_compile(self, blocks: list[nn.Module]) -> None:
        for block in blocks:
            if self.compile:
                compile_block(block, POLICIES[self.activation_checkpointing])
            elif self.activation_checkpointing == "full":
                _torch.checkpoint(block)
            elif self.activation_checkpointing == "selective":
                _torch.checkpoint(block, context_fn=_keep_expensive)

    def _fully_shard(self, model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh | None) -> None:
        if mesh is None or (mesh.size() == 1 and self.mixed_precision is None):
            return
        shard: Any = partial(fully_shard, mesh=mesh, mp_policy=self._policy())
        for block in blocks:
            if block is not model:
                # The last block is needed first in the backward: freeing it in between would gather it twice in a row.
                shard(block, reshard_after_forward=self.reshard_after_forward and block is not blocks[-1])
        for end in self._ends(model):
            shard(end, reshard_after_forward=False)
        shard(model, reshard_after_forward=False)

    def _ends(self, model: nn.Module) -> list[list[nn.Module]]:
        """Embedding, and norm with head: needed at different times, unless they share a parameter."""
        if self.own_plan is not None or tied_parameters(model):
            return []
        ends = self._architecture(model).ends
        return [[model.get_submodule(name) for name in names] for names in ends]

    def _policy(self) -> MixedPrecisionPolicy:
        if isinstance(self.mixed_precision, MixedPrecisionPolicy):
            return self.mixed_precision
        if self.mixed_precision is None:
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        # Inputs are not cast: rotary tables in bf16 would lose positions.
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def litgpt(
    *,
    sequence_parallel: bool = True,
    regather: bool = True,
    loss_parallel: bool = True,
    fused_loss: bool = False,
    replicate_attention: bool = False,
    lean: bool = True,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile: bool = False,
    mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool = True,
) -> Parallelize:
    """Parallelize a ``litgpt.GPT``.

    Args:
        sequence_parallel: Norms and residuals hold only this rank's part of the sequence. The same bytes on the wire,
            less memory; the sequence length must be a multiple of the number of ranks.
        regather: With ``sequence_parallel``, keep only this rank's part of what is gathered before attention, MLP and
            head, and gather it again in the backward, beside the gradient of the input: two more gathers a layer, and
            ``4 s b h`` bytes less in 16 bits. Activation checkpointing gathers again anyway, and so does what it does.
        loss_parallel: Logits stay sharded over the vocabulary, for :func:`fabric_tp.cross_entropy`. Otherwise every
            rank gets all of them.
        fused_loss: The head leaves the logits to :func:`fabric_tp.cross_entropy`, which computes them a chunk at a
            time together with the loss, so that they are never whole. Anything else that looks at them gets them.
        replicate_attention: Every rank computes the whole attention, for models whose heads cannot be divided;
            everything else is sharded.
        lean: Compute norms, activations and attention so that less is kept for the backward, where that is exactly
            equivalent to the model's own modules: outputs of norms and of activations are made again, keys and values
            are not repeated for the query heads that share them, masks of sliding windows are made once for all layers.
        activation_checkpointing: ``"none"``; ``"full"``: keep only each block's input and compute the block again in
            the backward; ``"selective"``: also keep the results of attention and of reductions.
        compile: Compile the forward of each block: one graph of plain tensors and collectives for all that are alike.
            It keeps what a block keeps that is not compiled; without ``sequence_parallel``, also outputs of norms.
        mixed_precision: ``"bf16-mixed"``: FSDP2 casts each block's parameters to bf16 for the computation and reduces
            gradients in fp32. Or a ``MixedPrecisionPolicy``.
        reshard_after_forward: Free a block's gathered parameters after its forward and gather them again in its
            backward. ``False``: more memory, less communication over the data-parallel ranks.
    """
    return Parallelize(architecture=LITGPT, **locals())


def llama(
    *,
    sequence_parallel: bool = True,
    regather: bool = True,
    loss_parallel: bool = True,
    fused_loss: bool = False,
    replicate_attention: bool = False,
    lean: bool = True,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile: bool = False,
    mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool = True,
) -> Parallelize:
    """Parallelize a Llama in Meta's names: ``tok_embeddings``, ``layers.*.attention.wq``, ..., ``output``.

    ``layers`` may be a ModuleList or a ModuleDict. The options are those of :func:`litgpt`.
    """
    return Parallelize(architecture=LLAMA, **locals())


def feed_forward(
    *,
    lean: bool = True,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile: bool = False,
    mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool = True,
) -> Parallelize:
    """Parallelize a SwiGLU MLP with layers ``w1``, ``w2`` and ``w3``, or a model made of such MLPs.

    Input and output are whole on every rank. The options are those of :func:`litgpt`.
    """
    return Parallelize(architecture=FEED_FORWARD, **locals())


def from_plan(
    plan: Mapping[str, ParallelStyle],
    *,
    blocks: str | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile: bool = False,
    mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool = True,
) -> Parallelize:
    """Parallelize any module by a plan.

    Args:
        plan: Styles of :mod:`fabric_tp.styles`, or torch's own, by name of the module; ``*`` stands for one part of a
            name (``"layers.*.attention.wq"``), and ``""`` for the model itself. Every parameter must be covered.
        blocks: Name of the ModuleList or ModuleDict whose children are sharded by FSDP2, checkpointed and compiled
            one by one. Without it the model is taken as a whole.

    The other options are those of :func:`litgpt`; whether sequence and loss are parallel is up to the plan.
    """
    options = dict(locals())
    return Parallelize(own_plan=dict(options.pop("plan")), **options)


def auto(
    *,
    sequence_parallel: bool = True,
    regather: bool = True,
    loss_parallel: bool = True,
    fused_loss: bool = False,
    replicate_attention: bool = False,
    lean: bool = True,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile: bool = False,
    mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool = True,
) -> Parallelize:
    """Parallelize a model of any known architecture, recognised by the names of its modules.

    The options are those of :func:`litgpt`. A model that is not recognised is a ValueError that says which are known.
    """
    return Parallelize(**locals())


def recognise(model: nn.Module) -> Architecture:
    """The architecture of a model."""
    for architecture in KNOWN:
        if architecture.matches(model):
            return architecture
    known = "; ".join(f"{architecture.name}: {architecture.description}" for architecture in KNOWN)
    raise ValueError(
        f"The architecture of this {type(model).__name__} is not known. Known are: {known}. For any other model write a"
        " plan and use fabric_tp.from_plan(plan)."
    )


def _refuse_arguments(names: tuple[str, ...], model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    for name in names:
        if kwargs.get(name):
            raise ValueError(
                f"{name}={kwargs[name]} cuts the sequence after each rank has got its part of it, so pieces of"
                " different ranks would be put together. Leave it out, and use fused_loss=True for less memory; or"
                " sequence_parallel=False."
            )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; it must be one of {', '.join(map(repr, choices))}.")


def _axis(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    names = mesh.mesh_dim_names or ()
    if name in names:
        return mesh if mesh.ndim == 1 else mesh[name]
    if name == TENSOR_PARALLEL:
        raise ValueError(
            f"The device mesh has the dimensions {names or '(unnamed)'} and none called {TENSOR_PARALLEL!r}. Fabric's"
            " ModelParallelStrategy makes the right one; by hand:"
            f" init_device_mesh(device, (dp, tp), mesh_dim_names=({DATA_PARALLEL!r}, {TENSOR_PARALLEL!r}))."
        )
    return None


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _synchronise(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Give all ranks the first rank's values, as data parallelism does: each is about to keep a part of its own copy.

    Parameters visit the device one by one; buffers stay there. In the order of their names: a module that makes its
    buffers from a set (Gemma 3's rotary tables) has them in another order in each process.
    """
    if mesh.size() > 1:
        for _, parameter in sorted(model.named_parameters()):
            if not parameter.is_meta:
                on_device = parameter.data.to(device)
                broadcast(on_device, mesh)
                parameter.data = on_device.to(parameter.device)
    for _, buffer in sorted(model.named_buffers()):
        if not buffer.is_meta:
            buffer.data = buffer.data.to(device)
            broadcast(buffer.data, mesh)


Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def _keep_expensive() -> Contexts:
    """Keep the results of attention, and those of reductions together with the products before them."""
    forward, recomputation = kept_reductions()
    attention = create_selective_checkpoint_contexts(_keep_attention)
    return _Both(attention[0], forward), _Both(attention[1], recomputation)


def _keep_nothing(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = "scaled_dot_product" in str(operation)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention_and_reductions(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _torch.COLLECTIVE_RESULTS:
        return CheckpointPolicy.MUST_SAVE
    return _keep_attention(context, operation)


POLICIES = {"none": None, "full": _keep_nothing, "selective": _keep_attention_and_reductions}
"""What is kept by a checkpoint that the compiler traces: it sees operators only."""


class _Both(AbstractContextManager[None]):
    """Two contexts as one; unlike a generator's, it may be entered again."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        self.stack = ExitStack()
        for context in self.contexts:
            self.stack.enter_context(context)

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
