"""Fine-tune a checkpoint, all its weights or low-rank adapters (LoRA), with tensor parallelism.

    fabric run recipes/finetune.py CHECKPOINT_DIR --accelerator cpu --devices 2 --lora true

starts from a checkpoint directory of litgpt, and without one from a tiny model with random weights. By default it
learns to answer what a function does with the line that defines it. `torchrun`, `srun` and plain `python` start it as
well, and `python recipes/finetune.py --help` explains all options. `out_dir` receives

    logs/metrics.csv     a row for each step
    step-00000100/ ...   distributed checkpoints, for --resume
    final/               litgpt's own layout, for `litgpt chat OUT_DIR/final`, and with --lora true the adapters too;
                         with --export huggingface Transformers' in huggingface/, and PEFT's of the adapters in peft/
"""

import logging
import warnings
from dataclasses import replace
from typing import Any

import lightning as L
import llama3
import torch
from arguments import Job
from base import lora_config, make_finetuned_model, make_tiny_checkpoint
from batches import Batches, number_of
from checkpoint_dir import check_checkpoint_dir
from checkpoints import prompt_style, save_beside
from finetune_arguments import FinetuneArgs, command_line, lora_options
from jsonargparse import set_parsing_settings
from llama3 import fit, launch, resume, stop_after_step
from logs import description, number_of_parameters
from memory import say_memory
from optimization import make_optimizer
from packing import Packed
from torch import nn

import fabric_tp
from fabric_tp.checkpoint import replacing


def main(args: FinetuneArgs) -> None:
    job = check(args)
    say_memory(job, lora_config(job.args, job.config))
    fabric = launch(job)
    batches = Batches(fabric, job)
    state = build(fabric, job, batches)
    resume(fabric, job, state)  # which reads the checkpoint that it starts from
    model = state["model"].module
    fabric.print(description(fabric, job, batches, model, state["step"]) + trained(model), flush=True)
    with stop_after_step() as stop:
        fit(fabric, job, batches, state, stop)
        finished = state["step"] >= args.max_steps
        if finished:
            save_final(fabric, job, model)
        else:
            fabric.save(path := args.out_dir / f"step-{state['step']:08d}", state)
            fabric.print(f"Stopped after step {state['step']} and saved {path}. Continue with --resume auto")
    if finished:
        print_answer(fabric, job, batches, model)
    fabric.barrier()


def check(args: FinetuneArgs) -> Job:
    """As in llama3.py; and what fine-tuning asks for beside it."""
    options = lora_options(args)
    directory = args.initial_checkpoint_dir or make_tiny_checkpoint(args.out_dir / "base")
    check_checkpoint_dir(directory)
    if args.export == "huggingface" and not (directory / "config.json").is_file():
        raise ValueError(f"--export huggingface: {directory} has no config.json, which Transformers needs.")
    data = Packed(args.data) if args.packing else args.data
    args = replace(args, initial_checkpoint_dir=directory, data=data)
    more = {"lora": args.lora, "packing": args.packing, "quantize": args.quantize, **options}
    return llama3.check(args, make_finetuned_model, **more)


def build(fabric: L.Fabric, job: Job, batches: Batches) -> dict[str, Any]:
    """Model, optimizer, and whatever else a checkpoint holds, as they are before the first step."""
    with fabric.init_module(empty_init=True):
        gpt = make_finetuned_model(job.args, job.config)
    gpt.max_seq_length = job.args.max_seq_length
    model = fabric.setup(gpt)
    optimizer = fabric.setup_optimizers(make_optimizer(job.args, model))
    run = {**job.run, "samples": number_of(batches.train_data)}
    return {"model": model, "optimizer": optimizer, "step": 0, "run": run, **batches.state()}


def save_final(fabric: L.Fabric, job: Job, model: nn.Module) -> None:
    """The files that litgpt's commands expect. Adapters are saved, and then become part of the weights."""
    args = job.args
    with replacing(args.out_dir / "final", moves=fabric.is_global_zero, barrier=fabric.barrier) as unfinished:
        if args.lora:
            fabric_tp.checkpoint.litgpt.save_adapters(model, unfinished / "lit_model.pth.lora")
            if args.export == "huggingface":
                fabric_tp.checkpoint.peft.save(model, unfinished / "peft", base=args.initial_checkpoint_dir)
            if args.quantize:  # to be merged with the weights as they were before
                fabric_tp.dequantize(model)
                fabric_tp.checkpoint.load(model, args.initial_checkpoint_dir)
            with torch.device("meta"):
                unparallelized = make_finetuned_model(args, job.config)
            fabric_tp.checkpoint.litgpt.merge_adapters(model, unparallelized)
        fabric_tp.checkpoint.litgpt.save(model, unfinished / "lit_model.pth", adapters=False)
        if args.export == "huggingface":
            like = args.initial_checkpoint_dir
            fabric_tp.checkpoint.huggingface.save(model, unfinished / "huggingface", like=like)
        if fabric.is_global_zero:
            # litgpt merge_lora finds the checkpoint that adapters belong to by this.
            save_beside(job, unfinished, command_line, checkpoint_dir=args.initial_checkpoint_dir.resolve())
            fabric_tp.checkpoint.huggingface.save_config(model, unfinished)


def print_answer(fabric: L.Fabric, job: Job, batches: Batches, model: nn.Module) -> None:
    args, tokenizer = job.args, batches.tokenizer
    prompt = tokenizer.encode(prompt_style(job).apply(args.sample_prompt), device=fabric.device).long()
    room = args.max_seq_length - len(prompt) - fabric.world_size
    if args.sample_tokens < 1 or room < 1:
        return
    number = min(args.sample_tokens, room)
    tokens = fabric_tp.generate(model, prompt, number, temperature=0, eos_id=tokenizer.eos_id)
    fabric.print(f"{'-' * 20} {args.sample_prompt}\n{tokenizer.decode(tokens[len(prompt) :])}\n{'-' * 20}")
    fabric.print(f"Ask it more: litgpt chat {args.out_dir / 'final'}")


def trained(model: nn.Module) -> str:
    every = number_of_parameters(model)
    number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"\ntrained: {number / 1e6:,.2f} M of {every / 1e6:,.1f} M parameters"


if __name__ == "__main__":
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists")  # logs.continue_csv takes care of it
    main(command_line())
