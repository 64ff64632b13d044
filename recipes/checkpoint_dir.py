"""Directories that a recipe may start from."""

from pathlib import Path

from litgpt.config import name_to_config

import fabric_tp


def check_checkpoint_dir(directory: Path) -> None:
    """Raises ValueError unless it is litgpt's, or the hub's of a model that litgpt has a config for."""
    fabric_tp.checkpoint.stored_dtype(directory)
    if not (directory / "model_config.yaml").is_file() and directory.name not in name_to_config:
        raise ValueError(
            f"{directory} has no model_config.yaml, and {directory.name!r} is none of litgpt's names: rename it to that"
            " which litgpt has for the model."
        )
