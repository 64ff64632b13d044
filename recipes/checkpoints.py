"""What a run leaves in its out_dir: checkpoints, which may or may not be this run's, and the final model."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from arguments import Args, Job, Sizes, command_line, tokenizer_folder
from jsonargparse import Namespace, capture_parser
from litgpt import Config, PromptStyle
from litgpt.prompts import save_prompt_style
from litgpt.utils import copy_config_files, save_config
from torch import nn

import fabric_tp
from fabric_tp.checkpoint import replacing
from fabric_tp.checkpoint.atomic import keep_last, remove_leftovers


def what_it_continues(args: Args, sizes: Sizes, config: Config) -> dict[str, Any]:
    """The model, and what decides which samples a step sees."""
    return {
        "seed": args.seed,
        "global_batch_size": sizes.global_batch,
        "max_seq_length": args.max_seq_length,
        "model": asdict(config),
    }


def find_checkpoint(args: Args, run: dict[str, Any]) -> Path | None:
    if args.resume is False:
        return None
    saved = sorted(path for path in args.out_dir.glob("step-*") if is_complete(path))
    if isinstance(args.resume, Path):
        if not is_complete(args.resume):
            found = ", ".join(map(str, saved)) or "none"
            raise ValueError(f"--resume {args.resume} is not a checkpoint of this recipe. In {args.out_dir}: {found}.")
        checkpoint = args.resume
    elif saved:
        checkpoint = saved[-1]
    elif args.resume == "auto":
        return None
    else:
        raise ValueError(f"--resume true: there is no checkpoint step-... in {args.out_dir}. Start with --resume auto.")
    check_same_run(checkpoint, torch.load(checkpoint / "meta.pt", weights_only=True).get("run", {}), run)
    return checkpoint


def is_complete(path: Path) -> bool:
    return (path / ".metadata").is_file() and (path / "meta.pt").is_file()


def check_same_run(checkpoint: Path, saved: dict[str, Any], run: dict[str, Any]) -> None:
    old, new = ({**each, **each.get("model", {})} for each in (saved, run))
    different = [key for key in new if key != "model" and key in new and old.get(key) != new[key]]
    if different:
        changes = ", ".join(f"{key} {old.get(key)!r} (now {new[key]!r})" for key in different)
        raise ValueError(
            f"{checkpoint} was made with {changes}. Use the same to continue it, or start a new run from the weights in"
            " a final/ directory."
        )


def set_aside(out_dir: Path, *, after: int, keep: int | None = None) -> None:
    """Move what an earlier run left there, from the step on that this run starts after: nothing is overwritten, and
    --resume auto never takes a checkpoint of another run for the newest of this one. What it was writing or
    removing when it crashed goes."""
    remove_leftovers(newest := out_dir / f"step-{after:08d}")
    earlier = [path for path in out_dir.glob("step-*") if int(path.name.removeprefix("step-")) > after]
    if after == 0:
        earlier += [path for path in (out_dir / "final", out_dir / "logs") if path.exists()]
    if earlier:
        target = out_dir / f"previous-{len(list(out_dir.glob('previous-*'))) + 1}"
        target.mkdir()
        for path in earlier:
            path.rename(target / path.name)
        print(f"Moved {', '.join(path.name for path in earlier)} of an earlier run to {target}")
    if keep is not None:
        keep_last(newest, keep)


def save_final(fabric: L.Fabric, job: Job, model: nn.Module) -> None:
    """The files that litgpt's commands expect."""
    with replacing(job.args.out_dir / "final", moves=fabric.is_global_zero, barrier=fabric.barrier) as unfinished:
        fabric_tp.checkpoint.litgpt.save(model, unfinished / "lit_model.pth")
        if fabric.is_global_zero:
            save_beside(job, unfinished, command_line)
            fabric_tp.checkpoint.huggingface.save_config(model, unfinished)


def save_beside(job: Job, folder: Path, command_line: Callable[[], Any], **changes: object) -> None:
    """Whatever else litgpt's commands expect beside the weights: config, tokenizer, prompt style and hyperparameters.

    Args:
        command_line: The recipe's.
        changes: Of hyperparameters, by their names.
    """
    args = job.args
    copy_config_files(tokenizer_folder(args) or args.data.tokenizer_dir, folder)  # type: ignore[attr-defined]
    save_config(job.config, folder)
    save_prompt_style(prompt_style(job), folder)
    parser = capture_parser(command_line)
    given = parser.parse_args()
    given.update(Namespace(**changes))
    parser.save(given, folder / "hyperparameters.yaml", overwrite=True)


def prompt_style(job: Job) -> PromptStyle:
    """That of instruction data, or else the model's."""
    style = getattr(job.args.data, "prompt_style", PromptStyle.from_config(job.config))
    return PromptStyle.from_name(style) if isinstance(style, str) else style
