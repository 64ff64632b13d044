"""What the recipe can be asked for, and whether it works.

Every mistake is a ValueError that says what was given and what would do. All but those about the content of the data
are found before any process meets another.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from data import TextFiles
from jsonargparse import auto_cli
from litgpt import Config, Tokenizer
from litgpt.data import DataModule

import fabric_tp
from fabric_tp.parallelize import BlockOptions, TransformerOptions, documented
from fabric_tp.strategy.launching import Launcher, detect

AT_LEAST_ONE = (
    *("data_parallel_size", "tensor_parallel_size", "global_batch_size", "micro_batch_size", "max_seq_length"),
    *("max_steps", "log_interval", "eval_interval", "eval_steps", "save_interval", "keep_last"),
)


@documented
@dataclass(frozen=True, kw_only=True)
class Args(TransformerOptions, BlockOptions):
    """Train a Llama-3-style model, or any other of litgpt's, with tensor parallelism."""

    model_name: str = "tiny-llama-3"
    """"tiny-llama-3" or one of litgpt's names, such as Llama-3.2-1B."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to that model's litgpt.Config, for example --model.n_layer 2."""
    initial_checkpoint_dir: Path | None = None
    """Start from the weights of this litgpt checkpoint. Its model and tokenizer replace --model_name and
    --tokenizer_dir."""
    tokenizer_dir: Path | None = None
    """A litgpt checkpoint directory with a tokenizer. Without one the default data trains its own."""
    data: DataModule = field(default_factory=TextFiles)
    """The default data module (--data.help data.TextFiles explains it) or one of litgpt's, such as litgpt.data.JSON."""
    out_dir: Path = Path("out/tiny-llama-3")
    """For logs, checkpoints and the final model. What an earlier run left there is moved to OUT_DIR/previous-1, ..."""
    resume: bool | Literal["auto"] | Path = False
    """"auto" continues from the newest checkpoint in out_dir if there is one, true insists on one, and a path names
    it. The number of processes may be another one than before."""

    tensor_parallel_size: int | None = None
    """How many processes split each layer. By default all of a machine, or what data_parallel_size leaves."""
    data_parallel_size: int | None = None
    """How many groups of such processes split the batch and, by FSDP2, the parameters."""
    fused_loss: bool = True
    mixed_precision: Literal["bf16-mixed"] | None = None

    max_steps: int = 300
    """How many optimizer steps to train, counted from the very beginning."""
    global_batch_size: int = 16
    """Samples per step, over all processes."""
    global_batch_tokens: int | None = None
    """The same in tokens, a multiple of max_seq_length; replaces global_batch_size."""
    micro_batch_size: int | None = None
    """Samples that a data-parallel rank computes at once, accumulating gradients. By default its whole share."""
    max_seq_length: int = 256
    """Tokens per sample."""
    lr: float = 0.01
    """Highest learning rate of AdamW, reached after the warm-up."""
    min_lr: float = 0.0005
    """Learning rate at the end, reached along a cosine."""
    warmup_steps: int = 30
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Of matrices and embeddings; norms and biases have none."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients."""
    max_norm: float = 1.0
    """Scale gradients down to this norm."""
    dropout: float = 0.0
    """Drop this share of what each attention and MLP adds, the same elements on any number of processes."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax denominator. If used, the logged training loss includes it."""
    seed: int = 42
    """Decides parameters, order of the data, dropout and sample, the same on any number of processes."""

    verify_inputs: int = 100
    """Compare the batches of the processes that share a model at the first and at every so many; 0 never does."""
    broadcast_inputs: bool = False
    """Only one process of those that share a model loads data and sends it to the others."""

    logger_name: Literal["csv", "tensorboard", "wandb"] = "csv"
    """Where each step's figures go."""
    log_interval: int = 20
    """Print a line every so many steps."""
    eval_interval: int = 100
    """Validate every so many steps, and before the first and after the last."""
    eval_steps: int = 4
    """How many global batches of the validation data to use, always the same ones."""
    save_interval: int = 100
    """Save a checkpoint every so many steps."""
    async_save: bool = False
    """Train on while a checkpoint is written, from a copy that each process keeps in memory: model and optimizer state
    once more."""
    keep_last: int | None = None
    """Keep so many checkpoints and remove older ones; by default keep all."""
    sample_prompt: str = "def "
    """Text that the model continues in the end."""
    sample_tokens: int = 64
    """By how many tokens, at most."""


def tokenizer_folder(args: Args) -> Path | None:
    """None: the default data trains a tokenizer of its own."""
    return args.initial_checkpoint_dir or args.tokenizer_dir


def parallelization(args: Args) -> fabric_tp.Parallelize:
    """With the options that the arguments share with the factory."""
    names = [each.name for options in (TransformerOptions, BlockOptions) for each in fields(options)]
    return fabric_tp.litgpt(**{name: getattr(args, name) for name in names})


@dataclass(frozen=True)
class Sizes:
    """What `Args` leaves open, decided."""

    data_parallel: int
    tensor_parallel: int
    global_batch: int
    micro_batch: int

    @property
    def accumulate(self) -> int:
        return self.global_batch // (self.data_parallel * self.micro_batch)


@dataclass(frozen=True)
class Job:
    """All that is known before processes meet."""

    args: Any
    """`Args`, or those of a recipe that has more."""
    launcher: Launcher
    sizes: Sizes
    config: Config
    tokenizer: Tokenizer | None
    """None if the data trains its own."""
    checkpoint: Path | None
    """To resume from."""
    run: dict[str, Any]
    """What a checkpoint must have been made with."""


def command_line(arguments: list[str] | None = None) -> Args:
    defaults = {"data": {"class_path": "data.TextFiles"}}  # so that --data.path works without --data
    return auto_cli(Args, as_positional=False, args=arguments, set_defaults=defaults)


def find_launcher(args: Args) -> Launcher:
    """What starts the processes. The parallel sizes default to all processes of a machine, or what the other leaves."""
    for name in AT_LEAST_ONE:
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    return detect(args.data_parallel_size, args.tensor_parallel_size)


def decide_sizes(args: Args, launcher: Launcher) -> Sizes:
    data_parallel = launcher.data_parallel_size
    global_batch = args.global_batch_size
    if args.global_batch_tokens is not None:
        global_batch, rest = divmod(args.global_batch_tokens, args.max_seq_length)
        if rest or not global_batch:
            raise ValueError(
                f"global_batch_tokens={args.global_batch_tokens} is not a multiple of"
                f" max_seq_length={args.max_seq_length}. {max(1, global_batch) * args.max_seq_length} is one."
            )
    micro_batch = args.micro_batch_size or max(1, global_batch // data_parallel)
    at_once = data_parallel * micro_batch
    if global_batch % at_once:
        works = f"{max(1, global_batch // at_once) * at_once} or {(global_batch // at_once + 1) * at_once}"
        raise ValueError(
            f"The global batch of {global_batch} samples cannot be divided by data_parallel_size x micro_batch_size ="
            f" {data_parallel} x {micro_batch} = {at_once}. --global_batch_size {works} can."
        )
    return Sizes(data_parallel, launcher.tensor_parallel_size, global_batch, micro_batch)


def connect_data(args: Args, sizes: Sizes) -> Tokenizer | None:
    folder = tokenizer_folder(args)
    if folder is None and not isinstance(args.data, TextFiles):
        raise ValueError(f"{type(args.data).__name__} needs a tokenizer: a checkpoint directory as --tokenizer_dir.")
    tokenizer = None
    if folder is not None:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise ValueError(f"{folder} holds neither tokenizer.json nor tokenizer.model.")
        tokenizer = Tokenizer(folder)
    args.data.connect(tokenizer=tokenizer, batch_size=sizes.micro_batch, max_seq_length=args.max_seq_length)
    return tokenizer
