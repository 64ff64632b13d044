"""The model that fine-tuning starts from."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from data import TextFiles, train_tokenizer
from finetune_arguments import FinetuneArgs, lora_options
from litgpt import GPT, Config, lora
from litgpt.utils import save_config
from model import TINY_LLAMA_3, make_model

import fabric_tp

TINY_SEED = 42


def make_finetuned_model(args: FinetuneArgs, config: Config) -> GPT:
    """With adapters if they are asked for, which are then all that is trained."""
    model = make_model(args, lora_config(args, config))
    if args.lora:
        lora.mark_only_lora_as_trainable(model)
    return model


def lora_config(args: FinetuneArgs, config: Config) -> Config:
    """That of the model with the adapters that are asked for; without any, as it is."""
    options = lora_options(args)
    if not options:
        return config
    assert args.initial_checkpoint_dir is not None
    return lora.Config.from_checkpoint(args.initial_checkpoint_dir, **options)


def make_tiny_checkpoint(directory: Path) -> Path:
    """A checkpoint of litgpt with the model and the tokenizer of the pretraining recipe, and random weights.

    Every process may make it, and all make the same: the first to finish gives it its name.
    """
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        files = TextFiles()
        files.connect()
        train_tokenizer(files.train_files, unfinished, files.vocab_size, int(files.tokenizer_megabytes * 1e6))
        config = Config(**TINY_LLAMA_3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(TINY_SEED)
            torch.save((model := GPT(config)).state_dict(), unfinished / "lit_model.pth")
        save_config(config, unfinished)
        fabric_tp.checkpoint.huggingface.save_config(model, unfinished)
        unfinished.chmod(0o755)  # mkdtemp's directories are closed to others
        os.rename(unfinished, directory)
    except OSError:
        if not directory.is_dir():  # otherwise another process was quicker
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory
