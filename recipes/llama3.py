"""Train a Llama-3-style model, or any other of litgpt's, with tensor parallelism.

    fabric run recipes/llama3.py --accelerator cpu --devices 2

trains a tiny model on the Python standard library's source files in a few minutes. `torchrun`, `srun` and plain
`python` start it as well, and `python recipes/llama3.py --help` explains all options. `out_dir` receives

    logs/metrics.csv     a row for each step
    step-00000100/ ...   distributed checkpoints, for --resume
    final/               litgpt's own layout, for `litgpt generate OUT_DIR/final --prompt "def "` and the like
"""

import csv
import itertools
import logging
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
import torch.nn.functional as F
from arguments import Args, Sizes, check_data, connect_data, decide_sizes, find_launcher, model_config
from checkpoints import check_same_run, find_checkpoint, set_aside, what_it_continues
from data import GlobalBatchSampler
from fabric_tp.launching import Launcher
from jsonargparse import auto_cli, capture_parser, set_parsing_settings
from lightning.fabric.loggers import CSVLogger, Logger, TensorBoardLogger
from litgpt import GPT, Config, PromptStyle, Tokenizer
from litgpt.pretrain import initialize_weights
from litgpt.prompts import save_prompt_style
from litgpt.utils import copy_config_files, save_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

import fabric_tp
from fabric_tp.checkpoint import replacing
from fabric_tp.data import SeededSamples

IGNORE = -100  # targets that do not count: prompts and padding in litgpt's instruction data


@dataclass(frozen=True)
class Job:
    """All that is known before processes meet."""

    args: Args
    launcher: Launcher
    sizes: Sizes
    config: Config
    parallelize: fabric_tp.Parallelize
    tokenizer: Tokenizer | None
    checkpoint: Path | None
    run: dict[str, Any]


def main(args: Args) -> None:
    job = check(args)
    L.seed_everything(args.seed, verbose=False)
    strategy = fabric_tp.TensorParallelStrategy(
        job.parallelize,
        data_parallel_size=job.sizes.data_parallel,
        tensor_parallel_size=job.sizes.tensor_parallel,
        verify_inputs=args.verify_inputs,
        broadcast_inputs=args.broadcast_inputs,
    )
    fabric = fabric_tp.launch(strategy, launcher=job.launcher, loggers=make_logger(args, job.config))
    if fabric.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    with fabric.rank_zero_first(local=True):
        args.data.prepare_data()
    args.data.setup()
    train(fabric, job, args.data.train_dataloader(), args.data.val_dataloader())
    fabric.barrier()


def check(args: Args) -> Job:
    """Find whatever can be wrong before processes meet: then none of them waits for another that has given up."""
    launcher = find_launcher(args)
    sizes = decide_sizes(args, launcher)
    config = model_config(args)
    parallelize = fabric_tp.litgpt(
        sequence_parallel=args.sequence_parallel,
        regather=args.regather,
        loss_parallel=args.loss_parallel,
        fused_loss=args.fused_loss,
        lean=args.lean,
        activation_checkpointing=args.activation_checkpointing,
        compile=args.compile,
        mixed_precision=args.mixed_precision,
    )
    with torch.device("meta"):
        model = make_model(args, config)
    parallelize.check(model, tensor_parallel_size=sizes.tensor_parallel, sequence_length=args.max_seq_length)
    tokenizer = connect_data(args, sizes)
    run = what_it_continues(args, sizes, config)
    return Job(args, launcher, sizes, config, parallelize, tokenizer, find_checkpoint(args, run), run)


def train(fabric: L.Fabric, job: Job, train_data: DataLoader, val_data: DataLoader) -> None:
    args, sizes, config = job.args, job.sizes, job.config
    tokenizer = job.tokenizer or args.data.tokenizer  # type: ignore[attr-defined]
    check_data(args, sizes, config, tokenizer, train_data, val_data)
    with fabric.init_module(empty_init=True):
        gpt = make_model(args, config)
    gpt.max_seq_length = args.max_seq_length
    initialize_weights(fabric, gpt, n_layer=config.n_layer, n_embd=config.n_embd)
    model = fabric.setup(gpt)
    optimizer = fabric.setup_optimizers(make_optimizer(args, model))

    state = {"model": model, "optimizer": optimizer, "step": 0, "run": {**job.run, "samples": number_of(train_data)}}
    streamed = fabric.setup_dataloaders(train_data) if number_of(train_data) is None else None
    if hasattr(streamed, "state_dict"):
        state["train_data"] = streamed
    if job.checkpoint is not None:
        fabric.load(job.checkpoint, loaded := dict(state))
        check_same_run(job.checkpoint, loaded["run"], state["run"])
        state["step"] = loaded["step"]
    elif args.initial_checkpoint_dir is not None:
        fabric_tp.checkpoint.litgpt.load(gpt, args.initial_checkpoint_dir / "lit_model.pth")
    first_step = state["step"]
    if fabric.is_global_zero:
        continues = job.checkpoint is not None and job.checkpoint.parent.resolve() == args.out_dir.resolve()
        set_aside(args.out_dir, after=first_step if continues else 0)
        continue_csv(fabric.logger, args.out_dir, first_step)
    fabric.print(description(fabric, job, gpt, first_step, train_data, val_data), flush=True)

    steps = max(0, args.max_steps - first_step)
    train_batches = (
        in_global_order(fabric, sizes, train_data, seed=args.seed, first_step=first_step, num_steps=steps)
        if streamed is None
        else over_and_over(streamed)
    )
    with stop_after_step() as stop:
        fit(fabric, args, sizes, state, train_batches, validation(fabric, args, sizes, val_data), tokenizer, stop)
        stopped = state["step"] < args.max_steps
        if stopped:
            path = args.out_dir / f"step-{state['step']:08d}"
            fabric.save(path, state)
            fabric.print(f"Stopped after step {state['step']} and saved {path}. Continue with --resume auto")
        else:
            save_final(fabric, args, config, gpt)
    if not stopped:
        print_sample(fabric, args, gpt, tokenizer)


def fit(
    fabric: L.Fabric,
    args: Args,
    sizes: Sizes,
    state: dict[str, Any],
    train_batches: Iterable[Any],
    val_batches: Iterable[Any],
    tokenizer: Tokenizer,
    stop: threading.Event,
) -> None:
    """Train from `state["step"]` to `max_steps`, or to the end of the step in which any process was asked to stop."""
    model, optimizer = state["model"], state["optimizer"]
    mesh = fabric.strategy.device_mesh  # type: ignore[attr-defined]
    micro_batches = iter(train_batches)
    bar = tqdm(
        total=args.max_steps,
        initial=state["step"],
        unit="step",
        dynamic_ncols=True,
        disable=not fabric.is_global_zero,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file need not hold every state of the bar
    )

    def say(message: str) -> None:
        if fabric.is_global_zero:
            bar.write(f"step {state['step']}/{args.max_steps}: {message}")

    def validate() -> float:
        loss, bits_per_byte = evaluate(fabric, args, sizes, model, val_batches, tokenizer)
        say(f"validation loss {loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte")
        return loss

    # The validation before training goes into the log's first row, every other one into that of the step before it.
    val_loss = validate() if state["step"] == 0 < args.max_steps else None
    while state["step"] < args.max_steps:
        start = time.perf_counter()
        state["step"] += 1
        lr = learning_rate(args, state["step"])
        for group in optimizer.param_groups:
            group["lr"] = lr

        batch = [inputs_and_targets(args, sizes, next(micro_batches)) for _ in range(sizes.accumulate)]
        num_targets = fabric_tp.count_targets((targets for _, targets in batch), mesh)
        loss = accumulate_gradients(fabric, args, model, batch, num_targets)
        gradient_norm = fabric.clip_gradients(model, optimizer, max_norm=args.max_norm)
        assert gradient_norm is not None  # since max_norm was given
        optimizer.step()
        optimizer.zero_grad()

        # One reduction for the loss and for the wish to stop: the ranks have to agree on the step after which they do.
        stopping = torch.tensor(float(stop.is_set()), device=fabric.device)
        mean_loss, stopping = reduce(fabric, torch.stack([loss, stopping]), "mean").tolist()
        row = {
            "loss": mean_loss,
            "learning_rate": lr,
            "tokens_per_second": num_targets.item() * sizes.data_parallel / (time.perf_counter() - start),
            "gradient_norm": gradient_norm.item(),
            "memory": memory_in_gb(fabric.device),
        }
        status = f"loss {row['loss']:.3f}, lr {lr:.1e}, {row['tokens_per_second']:,.0f} tokens/s"
        bar.set_postfix_str(f"{status}, {row['memory']:.2f} GB", refresh=False)
        bar.update()
        if state["step"] % args.log_interval == 0:
            say(status)
        if state["step"] % args.eval_interval == 0 or state["step"] == args.max_steps:
            val_loss = validate()
        log_row(fabric, {**row, "val_loss": val_loss}, state["step"])
        val_loss = None
        if stopping:
            break
        if state["step"] % args.save_interval == 0:
            fabric.save(args.out_dir / f"step-{state['step']:08d}", state)
    bar.close()


def accumulate_gradients(
    fabric: L.Fabric, args: Args, model: Any, batch: list[tuple[Tensor, Tensor]], num_targets: Tensor
) -> Tensor:
    """This rank's part of the loss of a step: the mean is over the targets of the global batch, of which instruction
    data gives each rank and micro-batch another number."""
    loss = torch.zeros((), device=fabric.device)
    for i, (inputs, targets) in enumerate(batch):
        with fabric.no_backward_sync(model, enabled=i < len(batch) - 1):
            logits = model(inputs)
            part = fabric_tp.cross_entropy(logits, targets, z_loss=args.z_loss, reduction="sum") / num_targets
            fabric.backward(part)
        loss += part.detach()
    return loss


@torch.no_grad()  # and not inference_mode, in which DTensors do not work
def evaluate(
    fabric: L.Fabric, args: Args, sizes: Sizes, model: nn.Module, batches: Iterable[Any], tokenizer: Tokenizer
) -> tuple[float, float]:
    """The mean loss in nats per token, and in bits per byte of the text, which does not depend on the tokenizer."""
    model.eval()
    loss, num_targets, num_bytes = 0.0, 0, 0
    for inputs, targets in (inputs_and_targets(args, sizes, batch) for batch in batches):
        loss += fabric_tp.cross_entropy(model(inputs), targets, reduction="sum").item()
        num_targets += int((targets != IGNORE).sum())
        num_bytes += sum(len(tokenizer.decode(row[row != IGNORE]).encode()) for row in targets)
    model.train()
    # Every sum counts each data-parallel rank tensor_parallel times, so their ratios are right.
    sums = torch.tensor([loss, num_targets, num_bytes], dtype=torch.float64, device=fabric.device)
    loss, num_targets, num_bytes = reduce(fabric, sums, "sum").clamp(min=1e-9).tolist()
    return loss / num_targets, loss / math.log(2) / num_bytes


def reduce(fabric: L.Fabric, tensor: Tensor, operation: str) -> Tensor:
    reduced = fabric.all_reduce(tensor, reduce_op=operation)
    assert isinstance(reduced, Tensor)
    return reduced


def inputs_and_targets(args: Args, sizes: Sizes, batch: Any) -> tuple[Tensor, Tensor]:
    """Inputs (b, t) and the targets (b, t) that follow them, of a batch of either kind that litgpt's data has.

    Instruction data is as long as its longest sample: it is padded on the right, unseen by the causal attention, to a
    length that sequence parallelism can split.
    """
    if isinstance(batch, Tensor):  # (b, t + 1) tokens
        return batch[:, :-1].long(), batch[:, 1:].long()
    inputs, targets = batch["input_ids"][:, :-1].long(), batch["labels"][:, 1:].long()
    padding = -inputs.shape[1] % (sizes.tensor_parallel if args.sequence_parallel else 1)
    return F.pad(inputs, (0, padding), value=0), F.pad(targets, (0, padding), value=IGNORE)


def number_of(loader: DataLoader) -> int | None:
    """Its samples; None if they are streamed."""
    return None if isinstance(loader.dataset, IterableDataset) else len(loader.dataset)  # type: ignore[arg-type]


def in_global_order(
    fabric: L.Fabric, sizes: Sizes, loader: DataLoader, *, seed: int, first_step: int, num_steps: int
) -> DataLoader:
    """The loader's samples in an order that depends on the seed and the global batch only, from any step on."""
    data_parallel_mesh = fabric.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined]
    sampler = GlobalBatchSampler(
        len(loader.dataset),  # type: ignore[arg-type]
        global_batch_size=sizes.global_batch,
        micro_batch_size=sizes.micro_batch,
        data_parallel_rank=data_parallel_mesh.get_local_rank(),
        data_parallel_size=sizes.data_parallel,
        seed=seed,
        first_step=first_step,
        num_steps=num_steps,
    )
    loader = DataLoader(
        SeededSamples(loader.dataset, seed),
        batch_sampler=sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        # A worker forked from this process may find a lock for ever taken that one of its threads held at the time.
        multiprocessing_context="forkserver" if loader.num_workers else None,
        persistent_workers=loader.num_workers > 0,
        pin_memory=fabric.device.type == "cuda",
    )
    return fabric.setup_dataloaders(loader, use_distributed_sampler=False)  # type: ignore[return-value]


def validation(fabric: L.Fabric, args: Args, sizes: Sizes, loader: DataLoader) -> Iterable[Any]:
    """The same batches every time, at most ``eval_steps`` global ones."""
    samples = number_of(loader)
    if samples is None:
        return FirstBatches(fabric.setup_dataloaders(loader), args.eval_steps * sizes.accumulate)
    if samples < sizes.global_batch:  # then all of them, as far as they can be divided
        sizes = replace(sizes, global_batch=samples - samples % sizes.data_parallel, micro_batch=1)
    steps = min(args.eval_steps, samples // sizes.global_batch)
    return in_global_order(fabric, sizes, loader, seed=0, first_step=0, num_steps=steps)


@dataclass(frozen=True)
class FirstBatches:
    loader: Iterable[Any]
    number: int

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.number)


def over_and_over(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def make_model(args: Args, config: Config) -> GPT:
    model = GPT(config)
    if args.dropout:
        for block in model.transformer.h:  # type: ignore[union-attr]
            # litgpt has no dropout. Here is where other models have theirs, and where nothing is unless the model has
            # norms there.
            block.post_attention_norm, block.post_mlp_norm = nn.Dropout(args.dropout), nn.Dropout(args.dropout)
    return model


def make_optimizer(args: Args, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)


def learning_rate(args: Args, step: int) -> float:
    """Linear warm-up, then a cosine; steps count from 1."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


@contextmanager
def stop_after_step() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event. Launchers may pass a signal on a second time, so a second one does nothing."""
    stop = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def save_final(fabric: L.Fabric, args: Args, config: Config, model: nn.Module) -> None:
    """The files that litgpt's commands expect."""
    with replacing(args.out_dir / "final", moves=fabric.is_global_zero, barrier=fabric.barrier) as unfinished:
        fabric_tp.checkpoint.litgpt.save(model, unfinished / "lit_model.pth")
        if not fabric.is_global_zero:
            return
        copy_config_files(args.tokenizer_dir or args.data.tokenizer_dir, unfinished)  # type: ignore[attr-defined]
        save_config(config, unfinished)
        save_prompt_style(getattr(args.data, "prompt_style", PromptStyle.from_config(config)), unfinished)
        parser = capture_parser(command_line)
        parser.save(parser.parse_args(), unfinished / "hyperparameters.yaml", overwrite=True)


# Logs


def description(
    fabric: L.Fabric, job: Job, model: nn.Module, first_step: int, train_data: DataLoader, val_data: DataLoader
) -> str:
    args, sizes = job.args, job.sizes
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    numbers = [
        f"{n:,} samples" if (n := number_of(data)) is not None else "a stream" for data in (train_data, val_data)
    ]
    return (
        f"{job.config.name}: {parameters:,.1f} M parameters on {sizes.data_parallel} x {sizes.tensor_parallel}"
        f" processes (data x tensor parallel, {fabric.device.type})\n"
        f"{type(args.data).__name__}: {numbers[0]} of {args.max_seq_length} tokens for training, {numbers[1]} for"
        f" validation\n"
        f"steps {first_step + 1} to {args.max_steps}, {sizes.global_batch} samples ="
        f" {sizes.global_batch * args.max_seq_length:,} tokens each, {sizes.accumulate} x {sizes.micro_batch} samples"
        f" per data-parallel rank\n"
        f"out_dir: {args.out_dir}" + (f", resumed from {job.checkpoint}" if job.checkpoint else "")
    )


def make_logger(args: Args, config: Config) -> Logger:
    if args.logger_name == "tensorboard":
        return TensorBoardLogger(args.out_dir / "logs", name="tensorboard")
    if args.logger_name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(project="fabric_tp", name=config.name, save_dir=args.out_dir / "logs")
    return CSVLogger(args.out_dir / "logs", name="", version="", flush_logs_every_n_steps=1)


def log_row(fabric: L.Fabric, row: dict[str, Any], step: int) -> None:
    if not isinstance(fabric.logger, CSVLogger):  # which writes its header once and so needs every column
        row = {name: value for name, value in row.items() if value is not None}
    fabric.logger.log_metrics(row, step)


def continue_csv(logger: Logger, out_dir: Path, step: int) -> None:
    """CSVLogger starts an empty file: write the rows up to `step` again. The later ones are about to be made anew."""
    path = out_dir / "logs" / "metrics.csv"
    earlier = path.with_name("metrics.csv.earlier")  # kept until its rows are in the new file
    if not isinstance(logger, CSVLogger):
        return
    if path.exists() and not earlier.exists():
        path.rename(earlier)
    if earlier.exists():
        with open(earlier, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        for row in rows:
            logger.log_metrics(row, int(row["step"]))  # type: ignore[arg-type]
        earlier.unlink()


def memory_in_gb(device: torch.device) -> float:
    """The most that was allocated on this rank's GPU; on the CPU, what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def print_sample(fabric: L.Fabric, args: Args, model: nn.Module, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(args.sample_prompt, device=fabric.device).long()
    room = args.max_seq_length - len(prompt) - fabric.world_size  # fabric_tp.generate pads to a multiple of the ranks
    if args.sample_tokens < 1 or room < 1 or len(prompt) == 0:
        return
    tokens = fabric_tp.generate(
        model, prompt, min(args.sample_tokens, room), temperature=0.8, top_k=50, seed=args.seed, eos_id=tokenizer.eos_id
    )
    fabric.print(f"{'-' * 20} sample\n{tokenizer.decode(tokens)}\n{'-' * 20}")
    fabric.print(f'More of them: litgpt generate {args.out_dir / "final"} --prompt "{args.sample_prompt}"')


def command_line(arguments: list[str] | None = None) -> Args:
    defaults = {"data": {"class_path": "data.TextFiles"}}  # so that --data.path works without --data
    return auto_cli(Args, as_positional=False, args=arguments, set_defaults=defaults)


if __name__ == "__main__":
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists")  # continue_csv takes care of it
    main(command_line())
