"""Checkpoints that are written while the training goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

import fabric_tp
from fabric_tp.checkpoint import atomic
from fabric_tp.strategy import background
from fabric_tp.strategy.staging import Staging
from tests.fabric import on_ranks
from tests.models import build
from tests.programs import python
from tests.programs import start as start_program
from tests.strategy.training import step_loss

SECONDS = 60
"""After which a test fails that waits for what does not happen."""


@contextmanager
def held() -> Iterator[threading.Event]:
    """Nothing is written before the event."""
    event = threading.Event()

    def save(*args: Any, **kwargs: Any) -> None:
        assert event.wait(SECONDS)
        written(*args, **kwargs)

    written = background.save
    with mock.patch.object(background, "save", save):
        yield event


class Position:
    """Of a dataloader."""

    def __init__(self) -> None:
        self.seen = [0]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def make_state(fabric: L.Fabric) -> dict[str, Any]:
    fabric.seed_everything(3, verbose=False)
    model = fabric.setup(build("Llama-3-8B"))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.1))
    return {"model": model, "optimizer": optimizer, "position": Position(), "log": {"losses": [1.0]}, "step": 0}


def train(fabric: L.Fabric, state: dict[str, Any]) -> None:
    fabric.backward(step_loss(fabric, state["model"]))
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    state["position"].seen.append(int(torch.randint(100, ())))
    state["log"]["losses"].append(2.0)
    state["step"] += 1


def saved(fabric: L.Fabric, path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    fabric.barrier()
    return {each.name: each.read_bytes() for each in path.glob("*.distcp")}, torch.load(path / "meta.pt")


def same_as_at_once(folder: Path, sizes: tuple[int, int], copies: bool) -> tuple[bool, bool]:
    """Whether a checkpoint written behind two steps of training is what it had been at once: tensors, and the rest."""
    found = []
    for name, options in {"at once": {}, "behind": {"async_save": True}}.items():
        with on_ranks(sizes, **options) as fabric, held() as go:  # type: ignore[arg-type]
            state = make_state(fabric)
            train(fabric, state)
            go.set()
            fabric.save(folder / f"{name}, before", state)  # whose memory the next one gets
            fabric.strategy.wait_until_saved()  # type: ignore[attr-defined]
            go.clear()
            train(fabric, state)
            with mock.patch.object(Staging, "__call__", Staging.__call__ if copies else lambda _, state: state):
                fabric.save(folder / name, state)
            train(fabric, state)
            train(fabric, state)
            go.set()
            fabric.strategy.wait_until_saved()  # type: ignore[attr-defined]
            found.append(saved(fabric, folder / name))
    (tensors, rest), (later, later_rest) = found
    assert tensors
    torch.testing.assert_close(later_rest.pop("fabric_tp"), rest.pop("fabric_tp"), rtol=0, atol=0)
    return tensors == later, rest == later_rest


@pytest.mark.swept(lambda p: p["sizes"] != (1, 2))
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 2)])
def test_it_is_the_state_at_the_moment_of_the_call(pool, tmp_path, sizes) -> None:
    assert pool(sizes[0] * sizes[1])(same_as_at_once, tmp_path / "copied", sizes, True) == (True, True)


def test_the_check_notices_a_state_that_is_not_copied(pool, tmp_path) -> None:
    assert pool(2)(same_as_at_once, tmp_path, (1, 2), False) == (False, True)


def save_again_and_load(folder: Path) -> tuple[bool, int]:
    """Whether the first checkpoint was whole when the state was copied for the second, and the step that is loaded."""
    whole = []

    def wait(writer: background.Writer) -> None:
        go.set()
        waited(writer)

    def stage(staging: Staging, state: Any) -> Any:
        whole.append((folder / "step-1" / ".metadata").exists())
        return staged(staging, state)

    waited, staged = background.Writer.wait, Staging.__call__
    with on_ranks((1, 2), async_save=True) as fabric, held() as go:
        state = make_state(fabric)
        fabric.save(folder / "step-1", {**state, "step": 1})
        with mock.patch.object(background.Writer, "wait", wait), mock.patch.object(Staging, "__call__", stage):
            fabric.save(folder / "step-2", {**state, "step": 2})
            go.clear()
            fabric.load(folder / "step-2", state)
        return whole[0], state["step"]


def test_saving_and_loading_wait_for_the_last_one(pool, tmp_path) -> None:
    assert pool(2)(save_again_and_load, tmp_path) == (True, 2)


FAILURES: dict[str, tuple[int, Any, str]] = {
    "shards": (1, FileSystemWriter, "write_data"),
    "the rest": (0, Path, "write_bytes"),
    "making room": (0, atomic, "_remove"),
    "removing": (0, background, "keep_last"),
}
"""The rank that fails, and in what."""


def fail_and_go_on(folder: Path, failure: str) -> list[list[str]]:
    """What each rank is told by the next step, save, load, and by waiting."""
    failing, holder, name = FAILURES[failure]
    messages = []
    with on_ranks((1, 2), async_save=True, keep_last=1) as fabric:
        state = make_state(fabric)
        fabric.save(folder / "step-1", state)
        fabric.strategy.wait_until_saved()  # type: ignore[attr-defined]
        train(fabric, state)
        after: list[Callable[[], Any]] = [
            lambda: train(fabric, state),
            lambda: fabric.save(folder / "step-3", state),
            lambda: fabric.load(folder / "step-1", state),
            lambda: fabric.strategy.wait_until_saved(),  # type: ignore[attr-defined]
        ]
        for each in after:
            full = mock.patch.object(holder, name, side_effect=OSError("disk full"))
            with full if fabric.global_rank == failing else nullcontext():
                fabric.save(folder / "step-2", state)
                fabric.strategy._writer._last[1].exception()  # type: ignore[attr-defined]
            with pytest.raises(RuntimeError) as raised:
                each()
            messages.append(str(raised.value))
        fabric.load(folder / "step-1" if failure != "removing" else folder / "step-2", state)
        fabric.save(folder / "step-4", state)
        fabric.strategy.wait_until_saved()  # type: ignore[attr-defined]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, messages)
    return gathered


@pytest.mark.swept(lambda p: p["failure"] in ("the rest", "removing"))
@pytest.mark.parametrize("failure", FAILURES)
def test_all_ranks_hear_what_one_could_not_write(pool, tmp_path, failure) -> None:
    told = pool(2)(fail_and_go_on, tmp_path, failure)
    path, rank = tmp_path / "step-2", FAILURES[failure][0]
    for messages in told:
        assert all(f"The checkpoint {str(path)!r} could not be written: " in each for each in messages)
        assert all(each.endswith("OSError: disk full") for each in messages)
    assert all(f"rank {rank}: OSError" in each for each in told[1 - rank])
    assert {each.name for each in tmp_path.iterdir()} == {"step-4"}


def save_numbered(folder: Path, async_save: bool) -> None:
    with on_ranks((1, 2), async_save=async_save, keep_last=2) as fabric:
        state = make_state(fabric)
        for step in (9, 10, 11):
            fabric.save(folder / f"step-{step}", state)
        fabric.strategy.wait_until_saved()  # type: ignore[attr-defined]
        fabric.load(folder / "step-10", state)


@pytest.mark.parametrize("async_save", [True, False])
def test_keep_last(pool, tmp_path, async_save) -> None:
    pool(2)(save_numbered, tmp_path, async_save)
    assert {path.name for path in tmp_path.iterdir()} == {"step-10", "step-11"}


def no_model(folder: Path) -> None:
    with on_ranks((1, 2), async_save=True) as fabric:
        with pytest.raises(ValueError, match="has 0 models that"):
            fabric.save(folder / "step-1", {"model": build("Llama-3-8B")})
        state = make_state(fabric)
        with pytest.raises(ValueError, match="has 2 models that"):
            fabric.save(folder / "step-1", {**state, "other": fabric.setup(build("Llama-3-8B"))})


def test_one_parallel_model_is_needed(pool, tmp_path) -> None:
    pool(2)(no_model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"async_save": True, "save_distributed_checkpoint": False}, "needs save_distributed_checkpoint=True"),
        ({"keep_last": 0}, "keep_last=0 would keep no checkpoint"),
    ],
)
def test_what_cannot_work_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        fabric_tp.TensorParallelStrategy(**options)


SCRIPT = """
import gc, sys, threading
import lightning as L
import fabric_tp
from fabric_tp.strategy import background
from tests.models import build

def save(*args, **kwargs):
    assert ended.wait(60)
    {first}
    written(*args, **kwargs)

written, background.save = background.save, save
ended = threading.Event()
threading._register_atexit(ended.set)  # when the main thread ends, before it waits for others

def main():
    strategy = fabric_tp.TensorParallelStrategy(fabric_tp.litgpt(), async_save=True)
    fabric = L.Fabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.launch()
    fabric.save(sys.argv[1], {{"model": fabric.setup(build("Llama-3-8B"))}})

main()
{last}
"""


@pytest.mark.swept(lambda p: p["last"] != "pass")
@pytest.mark.parametrize(
    ("last", "code"), [("pass", 0), ("sys.exit(3)", 3), ("raise KeyboardInterrupt", -signal.SIGINT)]
)
def test_the_end_of_a_script_waits(tmp_path, last, code) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(first="", last=last))
    program = start_program([*python(), str(tmp_path / "script.py"), str(tmp_path / "step-1")], tmp_path / "log")
    assert program.wait(SECONDS) == code, program.output.read_text()
    assert (tmp_path / "step-1" / "meta.pt").exists()


def test_the_end_of_a_script_tells_what_could_not_be_written(tmp_path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(first="raise OSError('disk full')", last="gc.collect()"))
    program = start_program([*python(), str(tmp_path / "script.py"), str(tmp_path / "step-1")], tmp_path / "log")
    assert program.wait(SECONDS) == 1
    assert "could not be written: OSError: disk full" in program.output.read_text()
    assert not (tmp_path / "step-1").exists()
