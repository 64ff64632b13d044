"""What a run tells: on the terminal, and in a file of figures."""

import csv
import sys
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from arguments import Args, Job
from batches import Batches, number_of
from lightning.fabric.loggers import CSVLogger, Logger, TensorBoardLogger
from litgpt import Config
from torch import nn
from tqdm import tqdm

import fabric_tp
from fabric_tp.styles.quantized import quantized_weights


class Log:
    """A bar with lines above it, which the first process shows, and the logger's row of figures for each step."""

    def __init__(self, fabric: L.Fabric, args: Args, first_step: int) -> None:
        self.fabric, self.args = fabric, args
        self.bar = tqdm(
            total=args.max_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not fabric.is_global_zero,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file need not hold every state of the bar
        )

    def say(self, step: int, message: str) -> None:
        if self.fabric.is_global_zero:
            self.bar.write(f"step {step}/{self.args.max_steps}: {message}")

    def show(self, step: int, row: dict[str, Any]) -> None:
        status = f"loss {row['loss']:.3f}, lr {row['learning_rate']:.1e}, {row['tokens_per_second']:,.0f} tokens/s"
        self.bar.set_postfix_str(f"{status}, {row['memory']:.2f} GB", refresh=False)
        self.bar.update()
        if step % self.args.log_interval == 0:
            self.say(step, status)

    def write(self, step: int, row: dict[str, Any]) -> None:
        if not isinstance(self.fabric.logger, CSVLogger):  # which writes its header once and so needs every column
            row = {name: value for name, value in row.items() if value is not None}
        self.fabric.logger.log_metrics(row, step)

    def close(self) -> None:
        self.bar.close()


def number_of_parameters(model: nn.Module) -> int:
    """Quantized ones too."""
    quantized = sum(weight.shape.numel() for weight in quantized_weights(model).values())
    return quantized + sum(parameter.numel() for parameter in model.parameters())


def description(fabric: L.Fabric, job: Job, batches: Batches, model: nn.Module, first_step: int) -> str:
    args, sizes = job.args, job.sizes
    parameters = number_of_parameters(model) / 1e6
    counts = [number_of(loader) for loader in (batches.train_data, batches.val_data)]
    training, validation = ("a stream" if count is None else f"{count:,} samples" for count in counts)
    return (
        f"{job.config.name}: {parameters:,.1f} M parameters on {sizes.data_parallel} x {sizes.tensor_parallel}"
        f" processes (data x tensor parallel, {fabric.device.type})\n"
        f"{type(args.data).__name__}: {training} of {args.max_seq_length} tokens for training, {validation} for"
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


def print_sample(fabric: L.Fabric, job: Job, batches: Batches, model: Any) -> None:
    args, tokenizer = job.args, batches.tokenizer
    prompt = tokenizer.encode(args.sample_prompt, device=fabric.device).long()
    room = args.max_seq_length + 1 - len(prompt)
    if args.sample_tokens < 1 or room < 1 or len(prompt) == 0:
        return
    tokens = fabric_tp.generate(
        model, prompt, min(args.sample_tokens, room), temperature=0.8, top_k=50, seed=args.seed, eos_id=tokenizer.eos_id
    )
    fabric.print(f"{'-' * 20} sample\n{tokenizer.decode(tokens)}\n{'-' * 20}")
    fabric.print(f'More of them: litgpt generate {args.out_dir / "final"} --prompt "{args.sample_prompt}"')
