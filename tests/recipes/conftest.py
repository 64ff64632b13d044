import sys
from pathlib import Path

import pytest

from tests.programs import RECIPES, fabric_run, python, run, run_ranks

from .runs import options

sys.path.insert(0, str(RECIPES))  # the recipe's files find each other as scripts do


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs, so that they share the cache of their data."""
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="session")
def run_1x1(folder: Path) -> Path:
    """The `out_dir` of a run that others are compared with."""
    run(python(), options(folder / "1x1"))
    return folder / "1x1"


@pytest.fixture(scope="session")
def run_1x2(folder: Path, run_1x1: object) -> tuple[Path, str]:
    """`out_dir` and output of the same run on two tensor-parallel ranks, under `fabric run`."""
    return folder / "1x2", run(fabric_run(2), options(folder / "1x2"))


@pytest.fixture(scope="session")
def run_2x2(folder: Path, run_1x1: object) -> Path:
    run_ranks(4, options(folder / "2x2", "--data_parallel_size", 2, "--tensor_parallel_size", 2))
    return folder / "2x2"
