"""Train a Llama-3-style model, or any other of litgpt's, with tensor parallelism.

    fabric run recipes/llama3.py --accelerator cpu --devices 2

trains a tiny model on the Python standard library's source files in a few minutes. `torchrun`, `srun` and plain
`python` start it as well, and `python recipes/llama3.py --help` explains all options. `out_dir` receives

    logs/metrics.csv     a row for each step
    step-00000100/ ...   distributed checkpoints, for --resume
    final/               litgpt's own layout, for `litgpt generate OUT_DIR/final --prompt "def "` and the like
"""

import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from arguments import Args, Job, command_line, connect_data, decide_sizes, find_launcher, parallelization
from batches import IGNORE, Batch, Batches, number_of
from checkpoints import check_same_run, find_checkpoint, save_final, set_aside, what_it_continues
from jsonargparse import set_parsing_settings
from litgpt import GPT, Config
from litgpt.pretrain import initialize_weights
from logs import Log, continue_csv, description, make_logger, memory_in_gb, print_sample
from model import make_model, model_config
from optimization import learning_rate, make_optimizer
from torch import Tensor

import fabric_tp


def main(args: Args) -> None:
    job = check(args)
    fabric = launch(job)
    batches = Batches(fabric, job)
    state = build(fabric, job, batches)
    resume(fabric, job, state)
    model = state["model"].module
    fabric.print(description(fabric, job, batches, model, state["step"]), flush=True)
    with stop_after_step() as stop:
        fit(fabric, job, batches, state, stop)
        finished = state["step"] >= args.max_steps
        if finished:
            save_final(fabric, job, model)
        else:
            fabric.save(path := args.out_dir / f"step-{state['step']:08d}", state)
            fabric.strategy.wait_until_saved()  # type: ignore[attr-defined]
            fabric.print(f"Stopped after step {state['step']} and saved {path}. Continue with --resume auto")
    if finished:
        print_sample(fabric, job, batches, model)
    fabric.barrier()


def check(args: Args, make: Callable[[Any, Config], GPT] = make_model, **more: Any) -> Job:
    """Find whatever can be wrong before processes meet: then none of them waits for another that has given up.

    `make` makes the model, and `more` must be the same when the run is continued.
    """
    launcher = find_launcher(args)
    sizes = decide_sizes(args, launcher)
    config = model_config(args)
    with torch.device("meta"):
        model = make(args, config)
    parallelization(args).check(model, tensor_parallel_size=sizes.tensor_parallel)
    tokenizer = connect_data(args, sizes)
    run = {**what_it_continues(args, sizes, config), **more}
    return Job(args, launcher, sizes, config, tokenizer, find_checkpoint(args, run), run)


def launch(job: Job) -> L.Fabric:
    args = job.args
    L.seed_everything(args.seed, verbose=False)
    strategy = fabric_tp.TensorParallelStrategy(
        parallelization(args),
        data_parallel_size=job.sizes.data_parallel,
        tensor_parallel_size=job.sizes.tensor_parallel,
        verify_inputs=args.verify_inputs,
        broadcast_inputs=args.broadcast_inputs,
        async_save=args.async_save,
        keep_last=args.keep_last,
    )
    fabric = fabric_tp.launch(strategy, launcher=job.launcher, loggers=make_logger(args, job.config))
    if fabric.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return fabric


def build(fabric: L.Fabric, job: Job, batches: Batches) -> dict[str, Any]:
    """Model, optimizer, and whatever else a checkpoint holds, as they are before the first step."""
    with fabric.init_module(empty_init=True):
        gpt = make_model(job.args, job.config)
    gpt.max_seq_length = job.args.max_seq_length
    initialize_weights(fabric, gpt, n_layer=job.config.n_layer, n_embd=job.config.n_embd)
    model = fabric.setup(gpt)
    optimizer = fabric.setup_optimizers(make_optimizer(job.args, model))
    run = {**job.run, "samples": number_of(batches.train_data)}
    return {"model": model, "optimizer": optimizer, "step": 0, "run": run, **batches.state()}


def resume(fabric: L.Fabric, job: Job, state: dict[str, Any]) -> None:
    """Go on from a checkpoint, or from other weights, and move aside what other runs have left in `out_dir`."""
    args = job.args
    if args.initial_checkpoint_dir is not None and (job.checkpoint is None or args.quantize):
        fabric_tp.checkpoint.load(state["model"], args.initial_checkpoint_dir)
    if job.checkpoint is not None:
        fabric.load(job.checkpoint, loaded := dict(state))
        check_same_run(job.checkpoint, loaded["run"], state["run"])
        state["step"] = loaded["step"]
    if fabric.is_global_zero:
        continues = job.checkpoint is not None and job.checkpoint.parent.resolve() == args.out_dir.resolve()
        set_aside(args.out_dir, after=state["step"] if continues else 0, keep=args.keep_last)
        continue_csv(fabric.logger, args.out_dir, state["step"])


def fit(fabric: L.Fabric, job: Job, batches: Batches, state: dict[str, Any], stop: threading.Event) -> None:
    """Train from `state["step"]` to `max_steps`, or to the end of the step in which any process was asked to stop."""
    args, log = job.args, Log(fabric, job.args, state["step"])
    training = batches.training(state["step"])

    def validate() -> float:
        loss, bits_per_byte = evaluate(fabric, state["model"], batches)
        log.say(state["step"], f"validation loss {loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte")
        return loss

    # The validation before training goes into the log's first row, every other one into that of the step before it.
    val_loss = validate() if state["step"] == 0 < args.max_steps else None
    stopping = False
    while state["step"] < args.max_steps and not stopping:
        step = state["step"] = state["step"] + 1
        row, stopping = train_step(fabric, job, training, state, stop)
        log.show(step, row)
        if step % args.eval_interval == 0 or step == args.max_steps:
            val_loss = validate()
        log.write(step, {**row, "val_loss": val_loss})
        val_loss = None
        if step % args.save_interval == 0 and not stopping:
            fabric.save(args.out_dir / f"step-{step:08d}", state)
    log.close()


def train_step(
    fabric: L.Fabric, job: Job, training: Iterator[Batch], state: dict[str, Any], stop: threading.Event
) -> tuple[dict[str, float], bool]:
    """The figures of the step, and whether any process was asked to stop."""
    start = time.perf_counter()
    args, model, optimizer = job.args, state["model"], state["optimizer"]
    lr = learning_rate(args, state["step"])
    for group in optimizer.param_groups:
        group["lr"] = lr

    micro_batches = [next(training) for _ in range(job.sizes.accumulate)]
    mesh = fabric.strategy.device_mesh  # type: ignore[attr-defined]
    num_targets = fabric_tp.count_targets((targets for _, targets in micro_batches), mesh)
    loss = accumulate_gradients(fabric, model, micro_batches, num_targets, args.z_loss)
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
        "tokens_per_second": num_targets.item() * job.sizes.data_parallel / (time.perf_counter() - start),
        "gradient_norm": gradient_norm.item(),
        "memory": memory_in_gb(fabric.device),
    }
    return row, bool(stopping)


def accumulate_gradients(
    fabric: L.Fabric, model: Any, micro_batches: list[Batch], num_targets: Tensor, z_loss: float
) -> Tensor:
    """This rank's part of the loss of a step: the mean is over the targets of the global batch, of which instruction
    data gives each rank and micro-batch another number."""
    loss = torch.zeros((), device=fabric.device)
    for i, (inputs, targets) in enumerate(micro_batches):
        with fabric.no_backward_sync(model, enabled=i < len(micro_batches) - 1):
            logits = model(inputs)
            part = fabric_tp.cross_entropy(logits, targets, z_loss=z_loss, reduction="sum") / num_targets
            fabric.backward(part)
        loss += part.detach()
    return loss


@torch.no_grad()  # and not inference_mode, in which DTensors do not work
def evaluate(fabric: L.Fabric, model: Any, batches: Batches) -> tuple[float, float]:
    """The mean loss in nats per token, and in bits per byte of the text, which does not depend on the tokenizer."""
    model.eval()
    loss, num_targets, num_bytes = 0.0, 0, 0
    for inputs, targets in batches.validation():
        loss += fabric_tp.cross_entropy(model(inputs), targets, reduction="sum").item()
        num_targets += int((targets != IGNORE).sum())
        num_bytes += sum(len(batches.tokenizer.decode(row[row != IGNORE]).encode()) for row in targets)
    model.train()
    # Every sum counts each data-parallel rank tensor_parallel times, so their ratios are right.
    sums = torch.tensor([loss, num_targets, num_bytes], dtype=torch.float64, device=fabric.device)
    loss, num_targets, num_bytes = reduce(fabric, sums, "sum").clamp(min=1e-9).tolist()
    return loss / num_targets, loss / math.log(2) / num_bytes


def reduce(fabric: L.Fabric, tensor: Tensor, operation: str) -> Tensor:
    reduced = fabric.all_reduce(tensor, reduce_op=operation)
    assert isinstance(reduced, Tensor)
    return reduced


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


if __name__ == "__main__":
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists")  # continue_csv takes care of it
    main(command_line())
