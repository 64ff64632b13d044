"""The recipe as its users start it, in processes of its own; a run serves several tests."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import pytest
import torch
from arguments import Args, Sizes, decide_sizes, find_launcher, model_config
from data import GlobalBatchSampler, TextFiles
from litgpt import GPT, Config
from llama3 import command_line, inputs_and_targets, learning_rate

import fabric_tp

from .conftest import RECIPES

BIN = Path(sys.executable).parent
MODEL = {"n_layer": 2, "n_embd": 64, "intermediate_size": 128, "vocab_size": 512}
COLUMNS = {"step", "loss", "val_loss", "learning_rate", "tokens_per_second", "gradient_norm", "memory"}
STEPS = 30


def options(out_dir: Path, *more: object) -> list[str]:
    text = {"path": Path(sysconfig.get_path("stdlib")) / "email", "pattern": "*.py", "val_fraction": 0.2}
    text |= {"vocab_size": 512, "cache_dir": out_dir.parent / "cache", "random_offset": "true"}
    given = {f"model.{name}": value for name, value in MODEL.items()} | {f"data.{k}": v for k, v in text.items()}
    given |= {"out_dir": out_dir, "max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4, "dropout": 0.1}
    given |= {"max_seq_length": 64, "warmup_steps": 5, "save_interval": 10, "eval_interval": 10, "eval_steps": 2}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)] + [str(part) for part in more]


def fabric_run(devices: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return [str(BIN / "fabric"), "run", "--accelerator", "cpu", "--devices", str(devices), "--main-port", str(port)]


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def python() -> list[str]:
    return [sys.executable]


def environment() -> dict[str, str]:
    """Without what a launcher around the tests may have set, and without GPUs."""
    launchers = ("LT_", "PL_", "SLURM_", "TORCHELASTIC_", "MASTER_", "OMP_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return {**env, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(__file__).parent)}


def run(launcher: list[str], arguments: list[str]) -> str:
    command = [*launcher, str(RECIPES / "llama3.py"), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(out_dir: Path) -> list[dict[str, str]]:
    with open(out_dir / "logs" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(out_dir: Path) -> torch.Tensor:
    return torch.tensor([float(row["loss"]) for row in rows(out_dir)], dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def run_1x1(folder: Path) -> tuple[Path, str]:
    return folder / "1x1", run(python(), options(folder / "1x1"))


@pytest.fixture(scope="module")
def run_1x2(folder: Path, run_1x1: object) -> tuple[Path, str]:
    return folder / "1x2", run(fabric_run(2), options(folder / "1x2"))


# Training


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("mesh", ["1x1", "1x2", "1x4", "2x1", "2x2"])
def test_losses_are_those_of_one_device(folder: Path, run_1x1: tuple[Path, str], mesh: str, accumulate: int) -> None:
    """With dropout, and with samples changed at random: in worker processes, or, as in the reference, without them."""
    dp, tp = map(int, mesh.split("x"))
    out_dir = folder / f"{mesh}-{accumulate}"
    more = ["--data_parallel_size", dp, "--tensor_parallel_size", tp, "--micro_batch_size", 8 // dp // accumulate]
    more += ["--data.num_workers", 0 if accumulate > 1 else 2 if mesh == "1x1" else 1]
    run(torchrun(2) if mesh == "2x1" else python(), options(out_dir, *more))
    reference = losses(run_1x1[0])
    assert len(reference) == STEPS
    assert reference[-1] < 0.9 * reference[0]
    torch.testing.assert_close(losses(out_dir), reference, rtol=1e-4, atol=0)
    for one, other in zip(rows(out_dir), rows(run_1x1[0]), strict=True):
        assert float(one["gradient_norm"]) == pytest.approx(float(other["gradient_norm"]), rel=1e-3)
        assert one["val_loss"] == other["val_loss"] == "" or (
            float(one["val_loss"]) == pytest.approx(float(other["val_loss"]), rel=1e-4)
        )


def test_dropout_and_random_samples_change_the_losses(folder: Path, run_1x1: tuple[Path, str]) -> None:
    """So that their sameness on all meshes means something."""
    for name, value in (("dropout", 0), ("data.random_offset", "false")):
        run(python(), options(folder / f"no-{name}", "--max_steps", 3, f"--{name}", value))
        assert (losses(folder / f"no-{name}") - losses(run_1x1[0])[:3]).abs().max() > 1e-3


def test_log_has_every_step_and_column(run_1x2: tuple[Path, str]) -> None:
    written = rows(run_1x2[0])
    assert set(written[0]) == COLUMNS
    assert [int(row["step"]) for row in written] == list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in written if row["val_loss"]] == [1, 10, 20, 30]
    assert all(float(row[name]) > 0 for row in written for name in COLUMNS - {"val_loss"})
    assert [path.parent for path in run_1x2[0].rglob("metrics.csv")] == [run_1x2[0] / "logs"]


def test_output(run_1x2: tuple[Path, str]) -> None:
    out_dir, output = run_1x2
    assert "1 x 2 processes (data x tensor parallel, cpu)" in output
    assert "step 30/30: validation loss" in output
    assert "bits/byte" in output
    assert "tokens/s, 0." in output  # the bar
    assert f"out_dir: {out_dir}" in output
    assert output.count("-- sample\ndef ") == 1
    assert "Warning" not in output


def test_validation_loss_is_that_of_one_device_with_the_final_weights(run_1x2: tuple[Path, str]) -> None:
    out_dir = run_1x2[0]
    args = command_line(options(out_dir))
    assert isinstance(args.data, TextFiles)
    args.data.connect(batch_size=8, max_seq_length=64)
    args.data.setup()
    model = GPT(Config.from_file(out_dir / "final" / "model_config.yaml"))
    model.load_state_dict(torch.load(out_dir / "final" / "lit_model.pth", weights_only=True))
    mesh = {"data_parallel_rank": 0, "data_parallel_size": 1}
    order = GlobalBatchSampler(
        len(args.data.val_dataset), global_batch_size=8, micro_batch_size=16, **mesh, seed=0, num_steps=2
    )
    samples = torch.stack([args.data.val_dataset[i] for batch in order for _, i in batch])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(samples[:, :-1]).flatten(0, 1), samples[:, 1:].flatten())
    assert loss.item() == pytest.approx(float(rows(out_dir)[-1]["val_loss"]), rel=1e-5)


def test_instruction_data_from_a_checkpoint(folder: Path, run_1x1: tuple[Path, str]) -> None:
    samples = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 41)]
    (folder / "samples.json").write_text(json.dumps(samples))
    instructions = ["--data", "litgpt.data.JSON", "--data.json_path", folder / "samples.json", "--data.num_workers", 1]
    instructions += ["--data.mask_prompt", "true", "--data.val_split_fraction", 0.25]
    instructions += ["--initial_checkpoint_dir", run_1x1[0] / "final", "--max_seq_length", 256, "--max_steps", 4]
    instructions += ["--global_batch_size", 8, "--micro_batch_size", 2]
    given = [str(part) for part in instructions]
    run(python(), ["--out_dir", str(folder / "json-1x1"), *given])
    run(fabric_run(2), ["--out_dir", str(folder / "json-2x1"), "--data_parallel_size", "2", *given])
    torch.testing.assert_close(losses(folder / "json-2x1"), losses(folder / "json-1x1"), rtol=1e-4, atol=0)
    assert "Alpaca" in (folder / "json-2x1" / "final" / "prompt_style.yaml").read_text()


def test_streamed_data(folder: Path, run_1x1: tuple[Path, str]) -> None:
    """On two ranks as on one, over more than one pass, and resumed where it was."""
    given = ["--data", "streamed.Streamed", "--initial_checkpoint_dir", run_1x1[0] / "final", "--max_seq_length", 64]
    given += ["--global_batch_size", 8, "--micro_batch_size", 4, "--max_steps", 8, "--save_interval", 3]
    run(python(), [str(part) for part in ["--out_dir", folder / "streamed", *given]])
    run(fabric_run(2), [str(part) for part in ["--out_dir", folder / "streamed-1x2", *given]])
    torch.testing.assert_close(losses(folder / "streamed-1x2"), losses(folder / "streamed"), rtol=1e-4, atol=0)
    resume = ["--resume", folder / "streamed" / "step-00000003"]
    run(fabric_run(2), [str(part) for part in ["--out_dir", folder / "streamed-resumed", *given, *resume]])
    torch.testing.assert_close(losses(folder / "streamed-resumed"), losses(folder / "streamed")[3:], rtol=1e-4, atol=0)


def test_litgpt_generates_from_the_final_directory(run_1x2: tuple[Path, str]) -> None:
    final = run_1x2[0] / "final"
    assert {path.name for path in final.iterdir()} == {
        *("lit_model.pth", "model_config.yaml", "hyperparameters.yaml", "prompt_style.yaml"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    command = [str(BIN / "litgpt"), "generate", str(final), "--prompt", "def ", "--max_new_tokens", "8"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "\ndef " in done.stdout


def test_hyperparameters_can_be_read_as_a_config(run_1x2: tuple[Path, str]) -> None:
    out_dir = run_1x2[0]
    again = command_line(["--config", str(out_dir / "final" / "hyperparameters.yaml")])
    assert repr(vars(again)) == repr(vars(command_line(options(out_dir))))


# Checkpoints


def interrupted_copy(out_dir: Path, copy: Path) -> Path:
    """What `out_dir` looked like after a crash in step 13, while a checkpoint was being written."""
    shutil.copytree(out_dir, copy, ignore=shutil.ignore_patterns("final", "step-00000020", "step-00000030", "logs"))
    (copy / ".step-00000020.unfinished").mkdir()
    (copy / "step-00000013").mkdir()  # not complete
    (copy / "logs").mkdir()
    lines = (out_dir / "logs" / "metrics.csv").read_text().splitlines(keepends=True)
    (copy / "logs" / "metrics.csv").write_text("".join(lines[:14]))
    return copy


def test_resume_auto_continues_the_same_losses(folder: Path, run_1x1: tuple[Path, str]) -> None:
    out_dir = interrupted_copy(run_1x1[0], folder / "resumed")
    output = run(python(), options(out_dir, "--resume", "auto"))
    assert f"resumed from {out_dir / 'step-00000010'}" in output
    assert [int(row["step"]) for row in rows(out_dir)] == list(range(1, STEPS + 1))
    torch.testing.assert_close(losses(out_dir), losses(run_1x1[0]), rtol=1e-6, atol=0)
    assert (out_dir / "final" / "lit_model.pth").is_file()


def test_resume_on_another_mesh(folder: Path, run_1x1: tuple[Path, str]) -> None:
    out_dir = folder / "another-mesh"
    run(fabric_run(2), options(out_dir, "--resume", run_1x1[0] / "step-00000010"))
    assert [int(row["step"]) for row in rows(out_dir)] == list(range(11, STEPS + 1))
    torch.testing.assert_close(losses(out_dir), losses(run_1x1[0])[10:], rtol=1e-4, atol=0)


def test_a_new_run_moves_an_earlier_one_aside(folder: Path, run_1x1: tuple[Path, str]) -> None:
    out_dir = folder / "again"
    shutil.copytree(run_1x1[0], out_dir)
    run(python(), options(out_dir, "--max_steps", 2, "--tokenizer_dir", run_1x1[0] / "final"))
    assert {path.name for path in out_dir.iterdir()} == {"logs", "final", "previous-1"}
    assert len(rows(out_dir)) == 2
    assert len(rows(out_dir / "previous-1")) == STEPS
    assert (out_dir / "previous-1" / "step-00000030" / "meta.pt").is_file()


@pytest.mark.parametrize("launcher", [python, fabric_run])
def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path, run_1x1: object, launcher: object) -> None:
    out_dir = folder / "interrupted"
    shutil.rmtree(out_dir, ignore_errors=True)
    start = python() if launcher is python else fabric_run(2)
    more = ("--max_steps", 100_000, "--log_interval", 1, *(("--tensor_parallel_size", 2) if launcher is python else ()))
    process = subprocess.Popen(
        [*start, str(RECIPES / "llama3.py"), *options(out_dir, *more)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "step 3/" in line:
                os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
                break
        output = "".join(lines) + process.stdout.read()
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    step = int(rows(out_dir)[-1]["step"])
    assert f"Stopped after step {step} and saved {out_dir / f'step-{step:08d}'}" in output
    assert (out_dir / f"step-{step:08d}" / "meta.pt").is_file()
    assert not (out_dir / "final").exists()
    if launcher is python:  # torchrun, which `fabric run` uses, always reports the signal that it got
        assert process.returncode == 0
        assert "Traceback" not in output


# Mistakes


def sizes_of(args: Args, processes: int) -> Sizes:
    """What the recipe decides under `fabric run --devices PROCESSES`."""
    with mock.patch.dict(os.environ, {"LT_CLI_USED": "1", "WORLD_SIZE": str(processes)}):
        return decide_sizes(args, find_launcher(args))


def test_a_mistake_ends_all_processes(folder: Path) -> None:
    command = [*fabric_run(2), str(RECIPES / "llama3.py"), *options(folder / "bad", "--data_parallel_size", "4")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "ValueError: data_parallel_size x tensor_parallel_size = 4 x 1 = 4, but there are 2 processes" in done.stderr
    assert not (folder / "bad").exists()


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


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--model_name", "Llama-3-8b"], r"'Llama-3-8b' is not known. Did you mean Llama-3-8B or"),
        (["--model.n_layers", "2"], r"no 'n_layers'. Did you mean n_layer"),
        (["--model.n_head", "7"], r"does not fit tiny-llama-3"),
        (["--max_seq_length", "2048"], r"max_seq_length=2048 is above tiny-llama-3's 1024"),
        (["--initial_checkpoint_dir", "nowhere"], r"nowhere holds no lit_model.pth"),
        (["--dropout", "1"], r"--dropout 1.0 must lie in \[0, 1\)"),
        (
            ["--dropout", "0.1", "--model_name", "Gemma-2-2b", "--model.block_size", "256"],
            r"Gemma-2-2b has norms where",
        ),
    ],
)
def test_models_that_do_not_work(given: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model_config(command_line(given))


# One by one


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
    fabric_tp.litgpt().check(
        model, tensor_parallel_size=args.tensor_parallel_size or 2, sequence_length=args.max_seq_length
    )


def test_learning_rate() -> None:
    args = Args(lr=1.0, min_lr=0.1, warmup_steps=4, max_steps=12)
    rates = [learning_rate(args, step) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_instruction_data_is_shifted_and_padded() -> None:
    args = Args(global_batch_size=2)
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 0, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 3, 4, 5, 6], [-100, 2, 3, -100, -100, -100]]),
    }
    inputs, targets = inputs_and_targets(args, sizes_of(args, 4), batch)
    assert inputs.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert targets.tolist() == [[-100, 3, 4, 5, 6, *[-100] * 3], [2, 3, *[-100] * 6]]
