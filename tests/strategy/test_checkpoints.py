"""What a checkpoint holds, and what a crash leaves of it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fabric_tp.checkpoint.atomic import replacing
from tests.fabric import on_ranks
from tests.models import build
from tests.strategy.training import step_loss, weights


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def save_and_load(path: Path, ours: bool, distributed: bool) -> tuple[bool, int, int]:
    """Whether the counter is still one, its count, and the epoch of the scheduler."""
    with on_ranks((1, 2), ours, save_distributed_checkpoint=distributed) as fabric:
        found = []
        for saves in (True, False):
            model = fabric.setup(build("Llama-3-8B"))
            optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
            state = {"model": model, "optimizer": optimizer, "counter": Counter(), "scheduler": scheduler, "step": 0}
            if saves:
                fabric.backward(step_loss(fabric, model))
                optimizer.step()
                scheduler.step()
                state["counter"].count, state["step"] = 5, 7
                fabric.save(path, state)
            else:
                assert fabric.load(path, state) == {}
                found = [isinstance(state["counter"], Counter), scheduler.last_epoch, state["step"]]
        return tuple(found)  # type: ignore[return-value]


@pytest.mark.parametrize("distributed", [True, False])
def test_stateful_objects_are_restored(pool, tmp_path, distributed) -> None:
    assert pool(2)(save_and_load, tmp_path / "ours", True, distributed) == (True, 1, 7)
    if distributed:
        assert pool(2)(save_and_load, tmp_path / "fabric", False, distributed) == (False, 0, 7)


def load_with_fewer_layers(path: Path, ours: bool, distributed: bool, strict: bool) -> bool:
    with on_ranks((1, 2), ours, save_distributed_checkpoint=distributed) as fabric:
        fabric.save(path, {"model": fabric.setup(build("Llama-3-8B"))})
        smaller = build("Llama-3-8B")
        del smaller.transformer.h[1]  # type: ignore[union-attr, operator]
        fabric.load(path, {"model": fabric.setup(smaller)}, strict=strict)
        return True


@pytest.mark.parametrize("distributed", [True, False])
def test_unexpected_keys_are_reported(pool, tmp_path, distributed) -> None:
    assert pool(2)(load_with_fewer_layers, tmp_path / "1", False, distributed, True)
    assert pool(2)(load_with_fewer_layers, tmp_path / "2", True, distributed, False)
    with pytest.raises(AssertionError, match=r"keys that the model has not, such as \['transformer.h.1"):
        pool(2)(load_with_fewer_layers, tmp_path / "3", True, distributed, True)


def load_raw(path: Path) -> bool:
    with on_ranks((1, 2)) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        expected = weights(model)
        for parameter in model.parameters():
            parameter.data.zero_()
        fabric.load_raw(path, model)
        return all(torch.equal(weight, expected[name]) for name, weight in weights(model).items())


def test_plain_weights_load_into_the_parallel_model(pool, tmp_path) -> None:
    torch.save(build("Llama-3-8B").state_dict(), tmp_path / "lit_model.pth")
    assert pool(2)(load_raw, tmp_path / "lit_model.pth")


def save_twice(path: Path) -> None:
    with on_ranks((1, 2)) as fabric:
        model = fabric.setup(build("Llama-3-8B"))
        fabric.save(path, {"model": model, "step": 1})
        (path / "notes.txt").write_text("mine")
        fabric.save(path, {"model": model, "step": 2})
        state = {"model": model, "step": 0}
        fabric.load(path, state)
        assert state["step"] == 2


def test_saving_again_keeps_what_else_is_there(pool, tmp_path) -> None:
    pool(2)(save_twice, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def write_half(path: Path) -> None:
    with replacing(path, moves=True, barrier=lambda: None) as unfinished:
        unfinished.mkdir()
        (unfinished / "meta.pt").write_text("half")
        raise OSError("disk full")


def test_crash_while_saving_leaves_the_older_checkpoint(tmp_path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "meta.pt").write_text("old")
    with pytest.raises(OSError):
        write_half(path)
    assert (path / "meta.pt").read_text() == "old"


def test_crash_between_renames_is_repaired(tmp_path) -> None:
    path = tmp_path / "checkpoint"
    (tmp_path / ".checkpoint.replaced").mkdir()
    with replacing(path, moves=True, barrier=lambda: None) as unfinished:
        assert path.is_dir()
        unfinished.mkdir()
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]


def draw_after_loading(path: Path, ours: bool) -> bool:
    """Whether the numbers drawn after loading are those drawn after saving."""
    with on_ranks((1, 2), ours) as fabric:
        fabric.seed_everything(3, verbose=False)
        model = fabric.setup(build("Llama-3-8B"))
        fabric.save(path, {"model": model})
        drawn = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        fabric.load(path, {"model": model})
        again = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        return torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]


def test_random_states_are_part_of_checkpoints(pool, tmp_path) -> None:
    assert not pool(2)(draw_after_loading, tmp_path / "fabric", False)
    assert pool(2)(draw_after_loading, tmp_path / "ours", True)
