from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch.distributed as dist

from fabric_tp import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fabric_tp.cli", *arguments], capture_output=True, text=True)


def test_estimate(tmp_path) -> None:
    file = tmp_path / "estimate.json"
    sizes = ("--tensor_parallel_size", "2", "--data_parallel_size", "2", "--sequence_length", "64")
    done = run("estimate", "pythia-14m", *sizes, "--activation_checkpointing", "full", "--json", str(file))
    assert done.returncode == 0, done.stderr
    for part in ("parameters", "optimizer state", "peak, in", "all-gather", "data parallel"):
        assert part in done.stdout
    (written,) = json.loads(file.read_text())
    assert written["peak"] == sum(written["at_peak"].values())
    assert written["sent"]["tensor_parallel"] > 0


def test_explain() -> None:
    done = run("explain", "pythia-14m", "--tensor_parallel_size", "2")
    assert done.returncode == 0, done.stderr
    assert "VocabParallelEmbedding" in done.stdout


def test_mistakes_are_said_in_a_line() -> None:
    done = run("estimate", "pythia-15m")
    assert done.returncode == 1
    assert "pythia-14m" in done.stderr
    assert "Traceback" not in done.stderr


def test_fit_lists_the_cheapest_first(capsys) -> None:
    cli.estimate("pythia-14m", tensor_parallel_size=2, data_parallel_size=2, sequence_length=128, fit="1GiB")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")][-3:]
    sent = [float(line.split("│")[-2].strip().replace(",", "")) for line in lines]
    assert len(sent) == 3
    assert sent == sorted(sent)
    assert not dist.is_initialized()


def test_nothing_fits(capsys) -> None:
    cli.estimate("pythia-14m", tensor_parallel_size=2, sequence_length=64, fit="10 MB")
    assert "No mesh of 2 devices fits 10 MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"), [("80GiB", 80 * 2**30), ("80 gb", 80 * 10**9), ("1.5KiB", 1536), ("1000", 1000)]
)
def test_amounts_of_memory(text, expected) -> None:
    assert cli.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "many", "80 GiBs", "-1GB"])
def test_what_is_no_amount_of_memory(text) -> None:
    with pytest.raises(ValueError, match="80GiB"):
        cli.parse_bytes(text)
