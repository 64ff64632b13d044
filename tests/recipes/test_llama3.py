"""Training as users start it; a run serves several tests."""

from pathlib import Path

import pytest
import torch
from arguments import command_line
from batches import GlobalBatchSampler
from data import TextFiles
from litgpt import GPT, Config

from tests.programs import finish, run, run_ranks, start, torchrun

from .runs import STEPS, losses, options, rows

COLUMNS = {"step", "loss", "val_loss", "learning_rate", "tokens_per_second", "gradient_norm", "memory"}


def check_same(out_dir: Path, reference: Path) -> None:
    assert len(rows(reference)) == STEPS
    assert losses(reference)[-1] < 0.9 * losses(reference)[0]
    torch.testing.assert_close(losses(out_dir), losses(reference), rtol=1e-4, atol=0)
    for one, other in zip(rows(out_dir), rows(reference), strict=True):
        assert float(one["gradient_norm"]) == pytest.approx(float(other["gradient_norm"]), rel=1e-3)
        assert one["val_loss"] == other["val_loss"] == "" or (
            float(one["val_loss"]) == pytest.approx(float(other["val_loss"]), rel=1e-4)
        )


def test_losses_are_those_of_one_device(run_1x1: Path, run_1x2: tuple[Path, str], run_2x2: Path) -> None:
    """With dropout, and with samples changed at random."""
    check_same(run_1x2[0], run_1x1)
    check_same(run_2x2, run_1x1)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("mesh", "accumulate", "workers"),
    [("2x1", 1, 2), ("2x2", 4, 0)],
)
def test_losses_do_not_depend_on_micro_batches_and_workers(
    folder: Path, run_1x1: Path, mesh: str, accumulate: int, workers: int
) -> None:
    """Samples are changed at random in worker processes, or, as in the reference, without them."""
    dp, tp = map(int, mesh.split("x"))
    out_dir = folder / f"{mesh}-{accumulate}"
    more = ["--data_parallel_size", dp, "--tensor_parallel_size", tp, "--micro_batch_size", 8 // dp // accumulate]
    more += ["--data.num_workers", workers]
    if mesh == "2x1":
        run(torchrun(2), options(out_dir, *more))
    else:
        run_ranks(dp * tp, options(out_dir, *more))
    check_same(out_dir, run_1x1)


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "value"), [("dropout", 0), ("data.random_offset", "false")])
def test_dropout_and_random_samples_change_the_losses(folder: Path, run_1x1: Path, name: str, value: object) -> None:
    """So that their sameness on all meshes means something."""
    run_ranks(1, options(folder / f"no-{name}", "--max_steps", 3, f"--{name}", value))
    assert (losses(folder / f"no-{name}") - losses(run_1x1)[:3]).abs().max() > 1e-3


def test_log_has_every_step_and_column(run_1x2: tuple[Path, str]) -> None:
    written = rows(run_1x2[0])
    assert set(written[0]) == COLUMNS
    assert [int(row["step"]) for row in written] == list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in written if row["val_loss"]] == [1, 10, 20]
    assert all(float(row[name]) > 0 for row in written for name in COLUMNS - {"val_loss"})
    assert [path.parent for path in run_1x2[0].rglob("metrics.csv")] == [run_1x2[0] / "logs"]


def test_output(run_1x2: tuple[Path, str]) -> None:
    out_dir, output = run_1x2
    assert "1 x 2 processes (data x tensor parallel, cpu)" in output
    assert "step 20/20: validation loss" in output
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


def test_litgpt_generates_from_the_final_directory(run_1x2: tuple[Path, str], tmp_path: Path) -> None:
    final = run_1x2[0] / "final"
    assert {path.name for path in final.iterdir()} == {
        *("lit_model.pth", "model_config.yaml", "hyperparameters.yaml", "prompt_style.yaml"),
        *("tokenizer.json", "tokenizer_config.json", "config.json"),
    }
    command = ["litgpt", "generate", str(final), "--prompt", "def ", "--max_new_tokens", "8"]
    assert "\ndef " in finish([start(command, tmp_path / "output")])


def test_hyperparameters_can_be_read_as_a_config(run_1x2: tuple[Path, str]) -> None:
    out_dir = run_1x2[0]
    again = command_line(["--config", str(out_dir / "final" / "hyperparameters.yaml")])
    assert repr(vars(again)) == repr(vars(command_line(options(out_dir))))
