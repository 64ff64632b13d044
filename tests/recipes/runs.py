"""A small run of the recipe, and what it writes."""

import csv
import sysconfig
from pathlib import Path

import torch

MODEL = {"n_layer": 2, "n_embd": 64, "intermediate_size": 128, "vocab_size": 512}
STEPS = 20


def options(out_dir: Path, *more: object) -> list[str]:
    text = {"path": Path(sysconfig.get_path("stdlib")) / "email", "pattern": "*.py", "val_fraction": 0.2}
    text |= {"vocab_size": 512, "cache_dir": out_dir.parent / "cache", "random_offset": "true"}
    given = {f"model.{name}": value for name, value in MODEL.items()} | {f"data.{k}": v for k, v in text.items()}
    given |= {"out_dir": out_dir, "max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4, "dropout": 0.1}
    given |= {"max_seq_length": 64, "warmup_steps": 5, "save_interval": 10, "eval_interval": 10, "eval_steps": 2}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)] + [str(part) for part in more]


def rows(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "logs" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(out_dir: Path) -> torch.Tensor:
    return torch.tensor([float(row["loss"]) for row in rows(out_dir)], dtype=torch.float64)
