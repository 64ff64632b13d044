"""What fine-tuning can be asked for: what pretraining can, other than a model of its own, and adapters."""

from argparse import SUPPRESS
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from arguments import Args
from docstrings import Docstrings
from jsonargparse import ActionConfigFile, ArgumentParser
from litgpt.data import DataModule

from fabric_tp.parallelize import documented

OF_THE_CHECKPOINT: set[str | int] = {"model_name", "model", "initial_checkpoint_dir", "tokenizer_dir"}
CHECKPOINT_DIR = """The directory of the checkpoint to start from: litgpt's, such as the final/ of another run, or the
    hub's, if litgpt has a config of its name. Without one, a tiny model with random weights is made in OUT_DIR/base."""


@documented
@dataclass(frozen=True, kw_only=True)
class FinetuneArgs(Args):
    """Fine-tune a checkpoint, all its weights or low-rank adapters, with tensor parallelism."""

    lora: bool = False
    """Leave the checkpoint's weights as they are, and train low-rank adapters around them (LoRA)."""
    lora_r: int = 8
    """Rank of the adapters."""
    lora_alpha: int = 16
    """What an adapter adds is multiplied with lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """Drop this share of an adapter's input, the same elements on any number of processes."""
    lora_query: bool = True
    """Whether the attention's queries get an adapter."""
    lora_key: bool = False
    """Whether its keys get one."""
    lora_value: bool = True
    """Whether its values get one."""
    lora_projection: bool = False
    """Whether its output projection gets one."""
    lora_mlp: bool = False
    """Whether the layers of the MLP, and the router of experts, get one each."""
    lora_head: bool = False
    """Whether the last layer, to the vocabulary, gets one. Then --fused_loss has no effect."""

    data: DataModule = field(default_factory=Docstrings)
    """The default data module (--data.help docstrings.Docstrings explains it) or one of litgpt's, such as
    litgpt.data.JSON with --data.json_path. Prompt style and mask_prompt are options of theirs."""
    packing: bool = False
    """Put as many samples into a row as max_seq_length holds, instead of padding each. A token then also sees the
    samples before its own."""
    out_dir: Path = Path("out/finetune")
    export: Literal["huggingface"] | None = None
    """Write final/huggingface too, for Transformers, with the config of the checkpoint that this starts from; and with
    --lora true final/peft, the adapters by themselves in PEFT's layout."""

    max_steps: int = 200
    lr: float = 0.0002
    min_lr: float = 0.0
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_seq_length: int = 512
    """Tokens per sample at most; what is longer is cut off."""
    sample_prompt: str = "Return the sum of all numbers in a list."
    """An instruction that the model answers in the end."""


def command_line(arguments: list[str] | None = None) -> FinetuneArgs:
    parser = ArgumentParser(default_meta=False, description="Fine-tune a checkpoint with tensor parallelism.")
    parser.add_argument("--config", action=ActionConfigFile, help="Path to a configuration file.")
    parser.add_argument(  # without a default, which would replace what a configuration file says
        "checkpoint_dir", nargs="?", type=Path | None, default=SUPPRESS, help=" ".join(CHECKPOINT_DIR.split())
    )
    parser.add_class_arguments(
        FinetuneArgs, as_group=False, as_positional=False, sub_configs=True, skip=OF_THE_CHECKPOINT
    )
    parser.set_defaults({"data": {"class_path": "docstrings.Docstrings"}})  # so that --data.path works without --data
    given = vars(parser.instantiate_classes(parser.parse_args(arguments)))
    options = {each.name: given[each.name] for each in fields(FinetuneArgs) if each.name in given}
    return FinetuneArgs(initial_checkpoint_dir=given.get("checkpoint_dir"), **options)


def lora_options(args: FinetuneArgs) -> dict[str, Any]:
    """The options of litgpt.lora.Config; none without adapters.

    Raises:
        ValueError: They make no adapters, or something is given that needs --lora true.
    """
    options = {each.name: getattr(args, each.name) for each in fields(args) if each.name.startswith("lora_")}
    if args.quantize and not args.lora:
        raise ValueError(f"--quantize {args.quantize} is for weights that are not trained. Add --lora true.")
    if not args.lora:
        defaults = {each.name: each.default for each in fields(args)}
        for name in (name for name, value in options.items() if value != defaults[name]):
            raise ValueError(f"--{name} {options[name]} says how to make adapters, and without --lora true none are.")
        return {}
    if args.lora_r < 1:
        raise ValueError(f"--lora_r {args.lora_r} must be at least 1.")
    if not 0 <= args.lora_dropout < 1:
        raise ValueError(f"--lora_dropout {args.lora_dropout} must lie in [0, 1), for example 0.05.")
    layers = {name: value for name, value in options.items() if isinstance(value, bool)}
    if not any(layers.values()):
        ways = ", ".join(f"--{name} true" for name in layers)
        raise ValueError(f"--lora true, but no layer is to get an adapter. These give one: {ways}.")
    return options
