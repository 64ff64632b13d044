"""The same fine-tuning with litgpt's own command on one process: the same samples, seeds and first adapters."""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from batches import GlobalBatchSampler
from docstrings import Docstrings
from finetune_arguments import command_line, lora_options
from litgpt import lora
from litgpt.args import EvalArgs, TrainArgs
from litgpt.finetune import lora as litgpt_finetune
from torch.utils.data import DataLoader

import fabric_tp
from fabric_tp.testing.ranks import mesh
from tests.programs import run_ranks

from .finetuning import LENGTH, SAMPLES, STEPS, finetune_options
from .runs import losses

SEED, LR = 42, 0.01
SAME = ("--lora", "true", "--lora_mlp", "true", "--lora_dropout", 0, "--lr", LR, "--min_lr", LR, "--warmup_steps", 0)
SAME += ("--max_norm", 1e9, "--seed", SEED)


@dataclass
class InOurOrder(Docstrings):
    """The recipe's batches, a step's samples at once."""

    def train_dataloader(self) -> DataLoader:
        loader = super().train_dataloader()
        sampler = GlobalBatchSampler(
            len(self.train_dataset),
            global_batch_size=SAMPLES,
            micro_batch_size=SAMPLES,
            data_parallel_rank=0,
            data_parallel_size=1,
            seed=SEED,
            num_steps=STEPS,
        )
        order = [[index for _, index in batch] for batch in sampler]
        return DataLoader(self.train_dataset, batch_sampler=order, collate_fn=loader.collate_fn)


def save_first_adapters(config: lora.Config, path: Path) -> None:
    """As the recipe's are before the first step."""
    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = lora.GPT(config)
    fabric_tp.checkpoint.litgpt.save_adapters(fabric_tp.litgpt()(model, mesh(1, 1)), path)


def finetune_with_litgpt(base: Path, out_dir: Path, adapters: Path, options: dict, data: InOurOrder) -> torch.Tensor:
    """The loss of each step."""
    load, constant = litgpt_finetune.load_checkpoint, torch.optim.lr_scheduler.ConstantLR

    def load_both(fabric, model, path, strict) -> None:
        load(fabric, model, path, strict=strict)
        model.load_state_dict(torch.load(adapters, weights_only=True)["model"], strict=False)

    def keep_lr(optimizer, **_) -> torch.optim.lr_scheduler.LRScheduler:
        return constant(optimizer, factor=1.0)

    with (
        mock.patch.object(litgpt_finetune, "load_checkpoint", load_both),
        mock.patch.object(litgpt_finetune, "get_lr_scheduler", keep_lr),
        mock.patch.object(litgpt_finetune, "save_hyperparameters"),  # it reads the command line, here that of the tests
        mock.patch.object(litgpt_finetune, "merge_lora"),
    ):
        litgpt_finetune.setup(
            base,
            out_dir,
            precision="32-true",
            data=data,
            train=TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=SAMPLES,
                micro_batch_size=SAMPLES,
                epochs=1,
                max_steps=STEPS,
                max_seq_length=LENGTH,
            ),
            eval=EvalArgs(interval=1000, max_new_tokens=1, max_iters=1),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": LR, "weight_decay": 0.01, "betas": [0.9, 0.95]},
            },
            **options,
        )
    (log,) = out_dir.rglob("metrics.csv")
    with open(log, newline="") as file:
        return torch.tensor([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]], dtype=torch.float64)


@pytest.mark.sweep
@pytest.mark.parametrize("mesh_size", [1, 2])
def test_steps_are_those_of_litgpt(pool, folder: Path, run_1x1: Path, tmp_path: Path, mesh_size: int) -> None:
    base = run_1x1 / "final"
    given = finetune_options(base, folder / f"like-litgpt-{mesh_size}", *SAME)
    args = command_line(given)
    options = lora_options(args)
    run_ranks(mesh_size, given, "finetune")

    config = lora.Config.from_checkpoint(base, **options)
    pool(1)(save_first_adapters, config, tmp_path / "first.pth.lora")
    assert isinstance(args.data, Docstrings)
    data = InOurOrder(path=args.data.path, val_fraction=args.data.val_fraction, cache_dir=args.data.cache_dir)
    theirs = partial(finetune_with_litgpt, base, adapters=tmp_path / "first.pth.lora", options=options, data=data)
    expected = theirs(tmp_path / "litgpt")

    assert len(expected) == STEPS
    torch.testing.assert_close(losses(args.out_dir), expected, rtol=1e-5, atol=0)
    assert expected[-1] < 0.99 * expected[0]
    ours, of_litgpt = (
        torch.load(out_dir / "final" / "lit_model.pth.lora", weights_only=True)["model"]
        for out_dir in (args.out_dir, tmp_path / "litgpt")
    )
    assert ours.keys() == of_litgpt.keys()
    for key, value in of_litgpt.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4, msg=key)
