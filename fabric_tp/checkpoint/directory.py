"""A directory with a checkpoint, of which nobody need say what layout it has."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fabric_tp.checkpoint import huggingface, litgpt
from fabric_tp.checkpoint.files import LITGPT, Files


def load(model: nn.Module, directory: str | Path) -> None:
    """Read litgpt's ``lit_model.pth``, or what the hub has, into a parallelized model, each rank its own part.

    Raises:
        ValueError: See :func:`fabric_tp.checkpoint.litgpt.load` and :func:`fabric_tp.checkpoint.huggingface.load`.

    Example::

        fabric_tp.checkpoint.load(model, "checkpoints/meta-llama/Llama-3.2-1B")
    """
    file = Path(directory) / LITGPT
    if file.is_file():
        litgpt.load(model, file)
    else:
        huggingface.load(model, directory)


def stored_dtype(directory: str | Path) -> torch.dtype:
    """Of the first tensor in it.

    Raises:
        ValueError: It holds no checkpoint.
    """
    file = Path(directory) / LITGPT
    with Files(file if file.is_file() else directory) as files:
        return next(iter(files.dtypes.values()))
