"""Let a checkpoint answer, on as many processes as it takes.

    fabric run recipes/generate.py CHECKPOINT_DIR --devices 2 --prompt "What do llamas eat?"

prints an answer while it is made; without `--prompt` it is a chat in the terminal, where each line is a prompt of its
own. CHECKPOINT_DIR is a litgpt directory, such as what recipes/llama3.py leaves in final/, or one of the hub, with the
name that litgpt has for the model; it decides on tokenizer and prompt style. `torchrun`, `srun` and plain `python`
start it as well; `--help` explains all options.
"""

import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from checkpoint_dir import check_checkpoint_dir
from jsonargparse import auto_cli
from litgpt import GPT, Config, PromptStyle, Tokenizer
from litgpt.prompts import has_prompt_style, load_prompt_style
from tokenizers.decoders import DecodeStream

import fabric_tp
from fabric_tp.strategy.launching import detect

PRECISION: dict[torch.dtype, Any] = {
    torch.float32: "32-true",
    torch.bfloat16: "bf16-true",
    torch.float16: "16-true",
}
WAIT = timedelta(days=1)
"""How long processes wait for somebody to type."""


def main(
    checkpoint_dir: Path,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    compile: bool = False,
    tensor_parallel_size: int | None = None,
    data_parallel_size: int | None = None,
) -> None:
    """Continue prompts with a checkpoint.

    Args:
        checkpoint_dir: litgpt's, or the hub's if litgpt has a config of its name; with a tokenizer.
        prompt: What to answer, in the checkpoint's prompt style. Without it prompts are read from the terminal.
        max_new_tokens: How many tokens an answer has at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Choose among so many of the likeliest tokens only.
        top_p: Of these, choose among the likeliest that together have this probability.
        seed: Of the choice.
        compile: Compile the model for one new token; that takes a while, and pays for long answers.
        tensor_parallel_size: How many processes split each layer. By default all.
        data_parallel_size: How many groups of such processes split the parameters by FSDP2.
    """
    config, tokenizer = check(checkpoint_dir)
    launcher = detect(data_parallel_size, tensor_parallel_size)
    parallelize = fabric_tp.litgpt()
    with torch.device("meta"):
        parallelize.check(GPT(config), tensor_parallel_size=launcher.tensor_parallel_size)
    strategy = fabric_tp.TensorParallelStrategy(
        parallelize, launcher.data_parallel_size, launcher.tensor_parallel_size, timeout=WAIT, verify_inputs=0
    )
    precision = (
        None if "LT_PRECISION" in os.environ else PRECISION.get(fabric_tp.checkpoint.stored_dtype(checkpoint_dir))
    )
    fabric = fabric_tp.launch(strategy, launcher=launcher, precision=precision)
    model = load(fabric, checkpoint_dir, config)
    style = load_prompt_style(checkpoint_dir) if has_prompt_style(checkpoint_dir) else PromptStyle.from_config(config)
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "compile": compile,
    }
    for text in [prompt] if prompt is not None else typed(fabric):
        tokens = tokenizer.encode(style.apply(text), device=fabric.device).long()
        room = model.max_seq_length + 1 - len(tokens)
        if room < 1:
            fabric.print(f"This prompt has {len(tokens)} tokens, and the model takes {model.max_seq_length} at most.")
            continue
        stop = style.stop_tokens(tokenizer)
        count = min(max_new_tokens, room)
        say(fabric, tokenizer, fabric_tp.generate_stream(model, tokens, count, stop=stop, include_eos=False, **options))


def check(directory: Path) -> tuple[Config, Tokenizer]:
    """Find whatever can be wrong before processes meet: then none of them waits for another that has given up."""
    check_checkpoint_dir(directory)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{directory} holds neither tokenizer.json nor tokenizer.model.")
    return Config.from_checkpoint(directory), Tokenizer(directory)


def load(fabric: L.Fabric, directory: Path, config: Config) -> Any:
    """The model, of which each process reads its own shards."""
    with fabric.init_module(empty_init=True):
        gpt = GPT(config)
    model = fabric.setup(gpt)
    fabric_tp.checkpoint.load(model, directory)
    return model


def typed(fabric: L.Fabric) -> Iterator[str]:
    """What is typed into the terminal of the first process, until nothing is."""
    fabric.print("Each line is a prompt. An empty one ends the chat.")
    while text := fabric.broadcast(read() if fabric.is_global_zero else ""):
        yield text


def read() -> str:
    try:
        return input(">> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def say(fabric: L.Fabric, tokenizer: Tokenizer, tokens: Iterator[int]) -> None:
    """Print text as tokens come, and how fast they came."""
    count, start = 0, time.perf_counter()
    for text in decoded(tokenizer, tokens):
        fabric.print(text, end="", flush=True)
        count += 1
    seconds = time.perf_counter() - start
    fabric.print()
    fabric.print(f"{count} tokens, {count / seconds:.1f} tokens/s", file=sys.stderr, flush=True)


def decoded(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of each token, or an empty one while a character is not whole."""
    if tokenizer.backend != "huggingface":
        yield from tokenizer.decode_stream(map(torch.tensor, tokens))
        return
    stream = DecodeStream(skip_special_tokens=True)
    for token in tokens:
        yield stream.step(tokenizer.processor, token) or ""


if __name__ == "__main__":
    auto_cli(main)
