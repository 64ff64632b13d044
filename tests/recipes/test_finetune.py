"""Fine-tuning as users start it, from what the pretraining recipe has left; a run serves several tests."""

import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from finetune_arguments import command_line
from litgpt import GPT, Config, Tokenizer
from litgpt.chat import base as litgpt_chat
from litgpt.scripts.merge_lora import merge_lora

from tests.programs import fabric_run, finish, run, run_ranks, start
from tests.threads import one_thread

from .finetuning import FULL, LORA, STEPS, finetune_options
from .runs import losses, rows

State = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def base(run_1x1: Path) -> Path:
    return run_1x1 / "final"


@pytest.fixture(scope="session")
def full(folder: Path, base: Path) -> Path:
    run_ranks(1, finetune_options(base, folder / "full", *FULL), "finetune")
    return folder / "full"


@pytest.fixture(scope="session")
def adapted(folder: Path, base: Path) -> tuple[Path, str]:
    """`out_dir` and output, under `fabric run`."""
    return folder / "lora", run(fabric_run(2), finetune_options(base, folder / "lora", *LORA), "finetune")


@pytest.fixture(scope="session")
def quantized(folder: Path, base: Path) -> Path:
    run_ranks(2, finetune_options(base, folder / "quantized", *LORA, "--quantize", "bnb.nf4"), "finetune")
    return folder / "quantized"


def load(file: Path) -> State:
    return torch.load(file, weights_only=True)


def check_same(out_dir: Path, reference: Path) -> None:
    assert len(rows(reference)) == STEPS
    torch.testing.assert_close(losses(out_dir), losses(reference), rtol=1e-4, atol=0)
    for one, other in zip(rows(out_dir), rows(reference), strict=True):
        assert float(one["gradient_norm"]) == pytest.approx(float(other["gradient_norm"]), rel=1e-3)
        assert float(one["val_loss"] or 0) == pytest.approx(float(other["val_loss"] or 0), rel=1e-4)


def run_on(mesh: str, folder: Path, base: Path, *more: object) -> Path:
    data, tensor = map(int, mesh.split("x"))
    out_dir = folder / f"{mesh}{'-'.join(map(str, more[:2]))}"
    sizes = ("--data_parallel_size", data, "--tensor_parallel_size", tensor)
    run_ranks(data * tensor, finetune_options(base, out_dir, *sizes, *more), "finetune")
    return out_dir


@pytest.mark.sweep
@pytest.mark.parametrize("mesh", ["1x2", "2x1", "2x2"])
def test_losses_are_those_of_one_device(folder: Path, base: Path, full: Path, mesh: str) -> None:
    check_same(run_on(mesh, folder, base, *FULL), full)
    assert losses(full)[-1] < 0.9 * losses(full)[0]


@pytest.mark.sweep  # a run that is resumed on another mesh shows the same
@pytest.mark.parametrize("mesh", ["1x1", "2x1", "2x2"])
def test_losses_with_adapters_are_those_of_one_device(
    folder: Path, base: Path, adapted: tuple[Path, str], mesh: str
) -> None:
    """With dropout."""
    check_same(run_on(mesh, folder, base, *LORA), adapted[0])
    assert losses(adapted[0])[-1] < 0.99 * losses(adapted[0])[0]


@pytest.mark.sweep
@pytest.mark.parametrize("mesh", ["1x2", "2x2"])
@pytest.mark.parametrize("more", [FULL, LORA], ids=["full", "lora"])
def test_losses_of_packed_samples_are_those_of_one_device(
    folder: Path, base: Path, mesh: str, more: tuple[object, ...]
) -> None:
    packed = ("--packing", "true", "--global_batch_size", 4, "--micro_batch_size", 2, *more)
    reference = run_on("1x1", folder / str(more[0]), base, *packed)
    check_same(run_on(mesh, folder / str(more[0]), base, *packed), reference)


def test_adapters_start_where_the_checkpoint_is(full: Path, adapted: tuple[Path, str]) -> None:
    """What they add is zero at first: the first validation is that of the model without them."""
    assert float(rows(adapted[0])[0]["val_loss"]) == pytest.approx(float(rows(full)[0]["val_loss"]), rel=1e-5)


def test_output(adapted: tuple[Path, str]) -> None:
    out_dir, output = adapted
    memory = r"memory: \d+\.\d MiB for each process at the peak of a step of 4 x 256 tokens, in .* activations"
    assert re.search(memory, output)
    assert "trained: 0.01 M of 0." in output
    assert "1 x 2 processes (data x tensor parallel, cpu)" in output
    assert output.count(f"{'-' * 20} Return the sum of all numbers in a list.\n") == 1
    assert f"litgpt chat {out_dir / 'final'}" in output
    assert "Warning" not in output


def test_final_directories_hold_what_litgpts_do(full: Path, adapted: tuple[Path, str]) -> None:
    names = {"lit_model.pth", "model_config.yaml", "hyperparameters.yaml", "prompt_style.yaml"}
    names |= {"tokenizer.json", "tokenizer_config.json", "config.json"}
    assert {path.name for path in (full / "final").iterdir()} == names
    assert {path.name for path in (adapted[0] / "final").iterdir()} == names | {"lit_model.pth.lora"}
    for final in (full / "final", adapted[0] / "final"):
        GPT(Config.from_file(final / "model_config.yaml")).load_state_dict(load(final / "lit_model.pth"))


def test_merged_weights_are_bitwise_those_of_litgpt(base: Path, adapted: tuple[Path, str], tmp_path: Path) -> None:
    final = adapted[0] / "final"
    shutil.copytree(final, tmp_path / "final", ignore=shutil.ignore_patterns("lit_model.pth"))
    with one_thread():
        merge_lora(tmp_path / "final")
    here, there, before = (load(folder / "lit_model.pth") for folder in (final, tmp_path / "final", base))
    assert here.keys() == there.keys() == before.keys()
    assert [key for key in here if not torch.equal(here[key], there[key])] == []
    changed = {key.split(".h.")[-1][2:] for key in here if not torch.equal(here[key], before[key])}
    layers = ("attn.qkv", "attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj")
    assert changed == {f"{layer}.weight" for layer in layers}


def test_litgpt_chats(adapted: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("builtins.input", side_effect=["Return the path.", ""]):
        litgpt_chat.main(adapted[0] / "final", max_new_tokens=5)
    assert "Now chatting with tiny-llama-3" in capsys.readouterr().out


def test_hyperparameters_can_be_read_as_a_config(base: Path, adapted: tuple[Path, str]) -> None:
    again = command_line(["--config", str(adapted[0] / "final" / "hyperparameters.yaml")])
    given = command_line(finetune_options(base, adapted[0], *LORA))
    assert without_addresses(repr(vars(again))) == without_addresses(repr(vars(given)))


def without_addresses(text: str) -> str:
    return re.sub(r" at 0x\w+", "", text)


def test_resume_auto_continues_the_same_losses(folder: Path, base: Path, adapted: tuple[Path, str]) -> None:
    """On another mesh than before."""
    out_dir = folder / "resumed-lora"
    shutil.copytree(adapted[0], out_dir, ignore=shutil.ignore_patterns("final", f"step-{STEPS:08d}"))
    output = run_ranks(1, finetune_options(base, out_dir, *LORA, "--resume", "auto"), "finetune")
    assert f"resumed from {out_dir / 'step-00000003'}" in output
    torch.testing.assert_close(losses(out_dir), losses(adapted[0]), rtol=1e-4, atol=0)
    assert (out_dir / "final" / "lit_model.pth.lora").is_file()


@pytest.mark.sweep
def test_a_quantized_base_learns_nearly_as_well(
    folder: Path, base: Path, adapted: tuple[Path, str], quantized: Path
) -> None:
    """On another mesh after a resume as well; and the base comes out as it was.

    The tiny base is narrower than a block of 64 weights on each of two ranks: its rounded values depend on the mesh.
    """
    torch.testing.assert_close(losses(quantized), losses(adapted[0]), rtol=0.02, atol=0)
    assert not torch.equal(losses(quantized), losses(adapted[0]))
    out_dir = folder / "resumed-quantized"
    shutil.copytree(quantized, out_dir, ignore=shutil.ignore_patterns("final", f"step-{STEPS:08d}"))
    given = finetune_options(base, out_dir, *LORA, "--quantize", "bnb.nf4", "--resume", "auto")
    run_ranks(1, given, "finetune")
    torch.testing.assert_close(losses(out_dir), losses(quantized), rtol=3e-3, atol=0)
    here, before = (load(each / "lit_model.pth") for each in (quantized / "final", base))
    unchanged = [key for key in before if not key.endswith(("qkv.weight", "proj.weight", "fc_1.weight", "fc_2.weight"))]
    assert all(torch.equal(here[key], before[key]) for key in unchanged)


@pytest.mark.sweep
def test_a_quantized_base_is_in_no_step_checkpoint(quantized: Path, adapted: tuple[Path, str]) -> None:
    def size(out_dir: Path) -> int:
        return sum(file.stat().st_size for file in (out_dir / f"step-{STEPS:08d}").rglob("*") if file.is_file())

    assert size(quantized) < 0.9 * size(adapted[0])


@pytest.mark.sweep
def test_without_a_checkpoint_a_tiny_model_is_trained(folder: Path) -> None:
    out_dir = folder / "tiny"
    given = finetune_options(out_dir, out_dir, *FULL, "--max_steps", 2)[1:]
    output = run_ranks(2, given, "finetune")
    assert "trained: 1.05 M of 1.0 M parameters" in output
    assert {path.name for path in out_dir.iterdir()} == {"base", "final", "logs"}
    tokenizer = Tokenizer(out_dir / "base")
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"


@pytest.mark.sweep
def test_litgpt_generates_from_the_final_directory(adapted: tuple[Path, str], tmp_path: Path) -> None:
    command = ["litgpt", "generate", str(adapted[0] / "final"), "--prompt", "Return it.", "--max_new_tokens", "4"]
    assert "### Response:" in finish([start(command, tmp_path / "output")])
