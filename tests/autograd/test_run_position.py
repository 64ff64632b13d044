"""Positions in a run: numbers of samples, calls within a forward, and finding them again in the backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fabric_tp.autograd.dropout import Mask, dropped
from fabric_tp.autograd.run_position import FORWARDS, RunPosition
from fabric_tp.seeds import mix


def begin(position: RunPosition, batch: int, training: bool = True) -> None:
    position.begin(nn.Linear(1, 1).train(training), (), {"flag": True, "tokens": torch.zeros(batch, 3)})


def numbers(mask: Mask, batch: int) -> list[int]:
    return [mask.first + row * mask.stride for row in range(batch)]


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2])
def test_samples_have_the_same_numbers_on_any_mesh(size, micro_batches) -> None:
    found = []
    for rank in range(size):
        position = RunPosition(0, rank, size)
        for _ in range(2 * micro_batches):
            batch = 8 // size // micro_batches
            begin(position, batch)
            found += numbers(position.mask("a", 0.5, torch.zeros(batch, 3), None, 0), batch)
        assert position.samples == 16
    assert sorted(found) == list(range(16))


def test_evaluation_is_no_part_of_the_run() -> None:
    position = RunPosition(0)
    begin(position, 4, training=False)
    assert position.samples == 0


def test_calls_of_a_module_have_different_masks() -> None:
    position = RunPosition(seed=3)
    begin(position, 4)
    masks = [position.mask(name, 0.5, torch.zeros(4, 3), None, 0) for name in ("a", "a", "b")]
    assert [mask.key for mask in masks] == [mix(3, "a", 0), mix(3, "a", 1), mix(3, "b", 0)]
    begin(position, 4)
    again = position.mask("a", 0.5, torch.zeros(4, 3), None, 0)
    assert (again.key, again.first) == (masks[0].key, 4)


def test_what_has_no_samples_has_masks_of_its_rank() -> None:
    masks = []
    for rank in range(2):
        position = RunPosition(0, rank, 2)
        begin(position, 4)
        masks.append(position.mask("experts", 0.5, torch.zeros(7, 3), None, 0))
    assert [(mask.first, mask.stride) for mask in masks] == [(0, 1), (0, 1)]
    assert masks[0].key != masks[1].key


def test_continues_where_it_was_saved() -> None:
    position, other = RunPosition(seed=3), RunPosition(seed=4)
    begin(position, 4)
    other.load_state_dict(position.state_dict())
    for each in (position, other):
        begin(each, 4)
    x = torch.zeros(4, 3)
    assert position.mask("a", 0.5, x, None, 0) == other.mask("a", 0.5, x, None, 0)


def backward(position: RunPosition, forwards: int, preserve: bool = True) -> list[tuple[Mask, Mask]]:
    """For each of these forwards, the masks of forward and recomputation; their backwards come last, in order."""
    masks: list[list[Mask]] = []
    losses: list[Tensor] = []
    for number in range(forwards):
        begin(position, 2)
        masks.append([])

        def block(x: Tensor, number: int = number) -> Tensor:
            masks[number].append(position.mask("a", 0.5, x, None, 0))
            return (x * ~dropped(x.shape, masks[number][-1], x.device)).square()

        x = torch.ones(2, 3, requires_grad=True)
        losses.append(checkpoint(block, x, use_reentrant=False, preserve_rng_state=preserve).sum())
    for loss in losses:
        loss.backward()
    return [(first, again) for first, again in masks]


def test_a_recomputation_has_the_masks_of_the_first_time() -> None:
    found = backward(RunPosition(0), forwards=3)
    assert all(first == again for first, again in found)
    assert len({first.first for first, _ in found}) == 3


@pytest.mark.parametrize(("forwards", "preserve"), [(1, False), (FORWARDS + 1, True)], ids=["state", "too many"])
def test_a_recomputation_without_a_record_is_refused(forwards, preserve) -> None:
    with pytest.raises(ValueError, match=f"preserve_rng_state=False.*more than {FORWARDS} forwards"):
        backward(RunPosition(0), forwards, preserve)
