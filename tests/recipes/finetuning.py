"""A small run of the fine-tuning recipe."""

import sysconfig
from pathlib import Path

STEPS = 6
SAMPLES = 8
LENGTH = 256
FULL = ("--lr", 0.003)
LORA = ("--lora", "true", "--lora_mlp", "true", "--lora_projection", "true", "--lora_dropout", 0.1, "--lr", 0.01)


def finetune_options(base: Path, out_dir: Path, *more: object) -> list[str]:
    data = {"path": Path(sysconfig.get_path("stdlib")) / "email", "val_fraction": 0.2, "cache_dir": out_dir.parent}
    given = {f"data.{name}": value for name, value in data.items()} | {"out_dir": out_dir, "max_steps": STEPS}
    given |= {"global_batch_size": SAMPLES, "micro_batch_size": 4, "max_seq_length": LENGTH, "warmup_steps": 2}
    given |= {"save_interval": 3, "eval_interval": 3, "eval_steps": 2, "sample_tokens": 8}
    return [str(base), *(str(part) for name, value in given.items() for part in (f"--{name}", value)), *map(str, more)]
