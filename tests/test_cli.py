from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points

import pytest
import torch.distributed as dist
from litgpt.utils import save_config

from fabric_tp import cli
from tests.checkpoint.shared_families import config_of, download


@pytest.fixture
def run(monkeypatch, capsys):
    """What the command prints with these arguments."""

    def printed(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fabric-tp", *arguments])
        cli.main()
        return capsys.readouterr().out

    return printed


def test_estimate(run, tmp_path) -> None:
    file = tmp_path / "estimate.json"
    sizes = ("--tensor_parallel_size", "2", "--data_parallel_size", "2", "--sequence_length", "64")
    printed = run("estimate", "pythia-14m", *sizes, "--activation_checkpointing", "full", "--json", str(file))
    for part in ("parameters", "optimizer state", "peak, in", "all-gather", "data parallel"):
        assert part in printed
    (written,) = json.loads(file.read_text())
    assert written["peak"] == sum(written["at_peak"].values())
    assert written["sent"]["tensor_parallel"] > 0


def test_estimate_of_adapters_on_a_quantized_base(run, tmp_path) -> None:
    file = tmp_path / "estimate.json"
    adapters = ("--lora", "true", "--lora_r", "2", "--lora_mlp", "true", "--quantize", "bnb.nf4")
    run("estimate", "pythia-14m", "--sequence_length", "16", *adapters, "--json", str(file))
    (written,) = json.loads(file.read_text())
    assert written["most"]["gradients"] < 0.01 * 2 * 14e6
    in_blocks = 6 * 12 * 128**2
    assert written["least"]["parameters"] < 2 * (14.1e6 - in_blocks) + 0.6 * in_blocks


def test_time_is_predicted(run, tmp_path) -> None:
    file = tmp_path / "estimate.json"
    sizes = ("--tensor_parallel_size", "2", "--data_parallel_size", "2", "--sequence_length", "64")
    printed = run("estimate", "pythia-14m", *sizes, "--hardware", "h100", "--json", str(file))
    for part in ("peak, in", "predicted for H100", "waiting, tensor parallel", "tokens per second and device"):
        assert part in printed
    (written,) = json.loads(file.read_text())
    assert written["seconds"] == pytest.approx(sum(written["phases"].values()))


def test_a_list_of_what_fits_is_sorted_by_time(run) -> None:
    sizes = ("--data_parallel_size", "2", "--sequence_length", "64", "--fit", "1GiB", "--hardware", "h100")
    printed = run("estimate", "pythia-14m", *sizes)
    assert "tokens/s" in printed
    assert "GiB sent" not in printed


def test_a_plan(run, tmp_path) -> None:
    given = ("--devices", "2", "--hardware", "h100", "--sequence_length", "64", "--micro_batch_sizes", "[1]")
    printed = run("plan", "pythia-14m", *given, "--json", str(tmp_path / "plan.json"))
    assert printed.count("│ 1 ") >= 1
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [each["tensor_parallel_size"] for each in written] == [1, 2]
    assert written[0]["tokens_per_second"] > written[1]["tokens_per_second"]


def test_hardware_is_measured(run, tmp_path) -> None:
    run("hardware", str(tmp_path / "here.json"), "--accelerator", "cpu", "--devices", "1")
    given = ("--sequence_length", "16", "--precision", "32-true", "--hardware", str(tmp_path / "here.json"))
    assert "CPU threads" in run("estimate", "pythia-14m", *given)


def test_explain(run) -> None:
    assert "VocabParallelEmbedding" in run("explain", "pythia-14m", "--tensor_parallel_size", "2")


def test_convert(run, tmp_path) -> None:
    download("Llama-3-8B", tmp_path / "hub")
    save_config(config_of("Llama-3-8B"), tmp_path / "hub")
    assert "Wrote" in run("convert", str(tmp_path / "hub"), str(tmp_path / "litgpt"), "--to", "litgpt")
    files = {path.name for path in (tmp_path / "litgpt").iterdir()}
    assert files >= {"lit_model.pth", "model_config.yaml", "config.json"}


@pytest.mark.parametrize("command", ["estimate", "plan"])
def test_hardware_that_is_not_known_is_said(run, command) -> None:
    more = ("--devices", "2") if command == "plan" else ("--sequence_length", "16")
    with pytest.raises(SystemExit, match="'h1000' is neither a file nor one of a100, h100"):
        run(command, "pythia-14m", *more, "--hardware", "h1000")


def test_mistakes_are_said_in_a_line(run) -> None:
    with pytest.raises(SystemExit, match=r"fabric-tp: .*pythia-14m"):  # Python prints it, and exits with 1
        run("estimate", "pythia-15m")


def test_console_script() -> None:
    (script,) = entry_points(group="console_scripts", name="fabric-tp")
    assert script.load() is cli.main


@pytest.mark.sweep
def test_fit_lists_the_cheapest_first(capsys) -> None:
    cli.estimate("pythia-14m", tensor_parallel_size=2, sequence_length=64, fit="1GiB")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")][-2:]
    sent = [float(line.split("│")[-2].strip().replace(",", "")) for line in lines]
    assert len(sent) == 2
    assert sent == sorted(sent)
    assert not dist.is_initialized()


def test_nothing_fits(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "fit", lambda *args, **kwargs: iter(()))
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
