import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from arguments import Args, Sizes, command_line, decide_sizes, find_launcher, parallelization
from litgpt import GPT
from model import model_config

import fabric_tp
from tests.programs import RECIPES, start_ranks

from .runs import options


def sizes_of(args: Args, processes: int) -> Sizes:
    """What the recipe decides under `fabric run --devices PROCESSES`."""
    with mock.patch.dict(os.environ, {"LT_CLI_USED": "1", "WORLD_SIZE": str(processes)}):
        return decide_sizes(args, find_launcher(args))


def test_a_mistake_ends_all_processes(tmp_path: Path) -> None:
    programs = start_ranks(2, options(tmp_path / "bad", "--data_parallel_size", 4), tmp_path / "output")
    assert [program.wait() for program in programs] == [1, 1]
    sizes = "ValueError: data_parallel_size x tensor_parallel_size = 4 x 1 = 4, but there are 2 processes"
    assert (tmp_path / "output").read_text().count(sizes) == 2
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("given", "processes", "match"),
    [
        (
            {"tensor_parallel_size": 4},
            6,
            r"1 x 4 = 4, but there are 6 processes. These work: 6 x 1, 3 x 2, 2",
        ),
        ({"tensor_parallel_size": 2, "data_parallel_size": 3}, 4, r"3 x 2 = 6, but there are 4"),
        ({"tensor_parallel_size": 0}, 1, r"tensor_parallel_size=0 must be at least 1"),
        ({"log_interval": 0}, 1, r"log_interval=0 must be at least 1"),
        ({"data_parallel_size": 3}, 3, r"16 samples cannot be divided .* 3 x 5 = 15. --global_batch_size 15 or 30 can"),
        ({"micro_batch_size": 5}, 1, r"1 x 5 = 5. --global_batch_size 15 or 20 can"),
        ({"global_batch_tokens": 1000}, 1, r"global_batch_tokens=1000 is not a multiple of max_seq_length=256. 768 is"),
    ],
)
def test_sizes_that_do_not_fit(given: dict[str, int], processes: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sizes_of(Args(**given), processes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "processes", "expected"),
    [
        ({}, 4, (1, 4, 16, 16)),
        ({"data_parallel_size": 2}, 4, (2, 2, 16, 8)),
        ({"tensor_parallel_size": 2, "micro_batch_size": 1}, 4, (2, 2, 16, 1)),
        ({"global_batch_tokens": 1024}, 1, (1, 1, 4, 4)),
    ],
)
def test_sizes(given: dict[str, int], processes: int, expected: tuple[int, ...]) -> None:
    sizes = sizes_of(Args(**given), processes)  # type: ignore[arg-type]
    assert (sizes.data_parallel, sizes.tensor_parallel, sizes.global_batch, sizes.micro_batch) == expected


def test_parallel_options_reach_the_factory() -> None:
    assert parallelization(Args()) == fabric_tp.litgpt(fused_loss=True)  # the recipe's own default
    given = {"fused_loss": False, "activation_checkpointing": "full", "reshard_after_forward": False}
    assert parallelization(Args(**given)) == fabric_tp.litgpt(**given)


def test_tiny_config_is_the_default() -> None:
    args = command_line(["--config", str(RECIPES / "llama3" / "tiny.yaml")])
    assert repr(vars(args)) == repr(vars(command_line([])))


@pytest.mark.parametrize("name", ["tiny", "llama-3.2-1b", "llama-3-8b", "llama-3-70b"])
def test_configs(name: str) -> None:
    args = command_line(["--config", str(RECIPES / "llama3" / f"{name}.yaml")])
    for groups in (1, 2):
        sizes_of(args, groups * (args.tensor_parallel_size or 1))
    with torch.device("meta"):
        model = GPT(model_config(args))
    fabric_tp.litgpt().check(model, tensor_parallel_size=args.tensor_parallel_size or 2)
