"""The options of all factories, with their documentation; a recipe's or a command line's help comes from here."""

import inspect
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal, TypeVar, get_args

import docstring_parser
from torch.distributed.fsdp import MixedPrecisionPolicy

from fabric_tp.styles.quantized import Quantization

ActivationCheckpointing = Literal["none", "selective", "full"]
MixedPrecision = Literal["bf16-mixed"]


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What is done to the blocks of any model, however they are split."""

    activation_checkpointing: ActivationCheckpointing = "none"
    """``"none"``; ``"full"``: keep only each block's input and compute the block again in the backward;
    ``"selective"``: also keep the results of attention and of reductions, which takes less time."""
    compile: bool = False
    """Compile the forward of each block: one graph of plain tensors and collectives for all that are alike. It keeps
    what a block keeps that is not compiled; without ``sequence_parallel``, also outputs of norms."""
    mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None
    """``"bf16-mixed"``: FSDP2 casts each block's parameters to bf16 for the computation and reduces gradients in fp32.
    Or a ``MixedPrecisionPolicy``."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward and gather them again in its backward. ``False``: more
    memory, less communication over the data-parallel ranks."""
    overlap: bool = False
    """In training, compute each block's batch in two halves that take turns: one computes while the collectives of the
    other run. For where ranks wait for each other much of the time: many ranks, short layers, slow links. Each half has
    half as much to compute at once, and there are twice as many operations. Where neither FSDP2 nor activation
    checkpointing is at work, a ``litgpt.GPT`` is halved as a whole: no collective between blocks is waited for, and
    without ``fused_loss`` logits are copied once. Of a batch of one sample only the tokens in MLPs are halved. With
    ``compile`` nothing is: the compiler orders collectives to run beside other operations, and between CUDA devices of
    a machine makes those of the forward one operator with a product (asynchronous tensor parallelism, by symmetric
    memory; not tried on GPUs yet); a warning says so if it could not."""
    quantize: Quantization | None = None
    """``"bnb.nf4"`` or ``"bnb.fp4"``: keep the frozen weights of the blocks' linear layers in four bits a number
    (QLoRA), each rank its part, which FSDP2 does not split further. Needs bitsandbytes. A model on the meta device gets
    them from ``fabric_tp.checkpoint.load``; they are in no checkpoint of ``fabric.save``."""

    def __post_init__(self) -> None:
        _check_choice("activation_checkpointing", self.activation_checkpointing, get_args(ActivationCheckpointing))
        _check_choice("quantize", self.quantize, (None, *get_args(Quantization)))
        if not isinstance(self.mixed_precision, MixedPrecisionPolicy):
            _check_choice("mixed_precision", self.mixed_precision, (None, "bf16-mixed"))


Options = TypeVar("Options", bound=type)


def documented(cls: Options) -> Options:
    """Add what is said of a dataclass's fields, inherited ones too, to its docstring: for ``help()`` and ``--help``.

    A decorator: the documentation stays where the field is.
    """
    said: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if is_dataclass(each):
            parsed = docstring_parser.parse_from_object(each)
            said |= {field.arg_name: " ".join((field.description or "").split()) for field in parsed.params}
    positional_first = sorted(fields(cls), key=lambda field: bool(field.kw_only))
    shown = [field.name for field in positional_first if field.init and field.name in said]
    lines = "".join(f"    {name}: {said[name]}\n" for name in shown)
    cls.__doc__ = f"{inspect.getdoc(cls)}\n\nArgs:\n{lines}"
    return cls


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; it must be one of {', '.join(map(repr, choices))}.")
