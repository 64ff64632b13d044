"""Where a step waits, worked out by hand: operations of a second, collectives of three."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fabric_tp.measure.communication import Collective, CollectiveKind
from fabric_tp.measure.hardware import Hardware, Link
from fabric_tp.measure.operations import Issue, Operation, Wait
from fabric_tp.measure.schedule import schedule

MACHINE = Hardware(
    name="slow",
    flops={"float32": 1.0},
    bandwidth=1.0,
    memory=1,
    devices=2,
    inside=Link(1.0, 1.0, 0.0),
    outside=Link(1.0, 1.0, 0.0),
    shares={"products": 1.0, "attention": 1.0, "other operations": 1.0},
    kernel=0.0,
    collective=0.0,
)
STRIDES = {"tensor_parallel": 1, "data_parallel": 2}
SECOND = Operation("products", "forward", torch.float32, 2, 1, 0, 0, True)


def issue(number: int | None, axis: str = "tensor_parallel", kind: CollectiveKind = "all-gather") -> Issue:
    return Issue(Collective(kind, axis, 2, 6, ""), number)


def times(*events) -> tuple[float, dict[str, float], dict[str, float]]:
    found = schedule(events, MACHINE, STRIDES)
    assert sum(found.phases.values()) == pytest.approx(found.seconds)
    return found.seconds, found.exposed, found.hidden


def test_a_collective_that_is_waited_for_at_once_is_exposed() -> None:
    assert times(SECOND, issue(0), Wait(0), SECOND) == (5, {"tensor_parallel": 3}, {"tensor_parallel": 0})


def test_what_is_computed_in_between_hides_it() -> None:
    assert times(issue(0), SECOND, Wait(0), SECOND) == (4, {"tensor_parallel": 2}, {"tensor_parallel": 1})
    assert times(issue(0), *[SECOND] * 4, Wait(0)) == (4, {}, {"tensor_parallel": 3})


def test_a_processor_that_moves_what_it_sends_computes_later() -> None:
    """Two of a collective's three seconds are the processor's own: while it waits for it they are in these."""
    cpu = replace(MACHINE, processor=1.5)
    at_once = schedule([SECOND, issue(0), Wait(0), SECOND], cpu, STRIDES)
    assert (at_once.seconds, at_once.exposed) == (5, {"tensor_parallel": 3})
    beside = schedule([issue(0), *[SECOND] * 4, Wait(0)], cpu, STRIDES)
    assert (beside.seconds, beside.exposed) == (6, {"tensor_parallel": 2})
    partly = schedule([issue(0), SECOND, Wait(0)], cpu, STRIDES)  # a third of it
    assert partly.seconds == pytest.approx(3 + 2 / 3)


def test_a_processor_starts_a_collective_while_the_link_has_another() -> None:
    """One second to start, three on the link; what is hidden of the second one costs the processor half a second."""
    cpu = replace(MACHINE, processor=3.0, collective=1.0)
    assert schedule([issue(0), issue(1), Wait(0), Wait(1)], cpu, STRIDES).seconds == 7.5
    assert schedule([issue(0), issue(1), Wait(0), Wait(1)], replace(cpu, processor=None), STRIDES).seconds == 8


def test_collectives_of_an_axis_come_one_after_the_other() -> None:
    assert times(issue(0), issue(1), Wait(1))[0] == 6
    assert times(issue(0), issue(1, "data_parallel"), Wait(0), Wait(1))[0] == 3


def test_a_layer_is_gathered_beside_the_layer_before() -> None:
    """Although the program issues its gather when the layer before is issued, and waits at once."""
    gather, wait = issue(None, "data_parallel"), Wait(kind="all-gather")
    layer = (gather, wait, *[SECOND] * 4)
    assert times(*layer, *layer, *layer) == (3 + 3 * 4, {"data_parallel": 3}, {"data_parallel": 6})
    one, two, three = layer, layer[:3], layer  # the third gather may start when the second layer does
    assert times(*one, *two, *three) == (3 + 4 + 1 + 2 + 4, {"data_parallel": 5}, {"data_parallel": 4})


def test_gradients_are_reduced_beside_the_layer_before() -> None:
    backward = replace(SECOND, phase="backward")
    layer = (*[backward] * 2, Wait(kind="reduce-scatter"), issue(None, "data_parallel", "reduce-scatter"))
    end = replace(SECOND, phase="clipping")
    found = schedule([*layer, *layer, end], MACHINE, STRIDES)
    assert found.seconds == 2 + 3 + 3 + 1  # the second layer is reduced after the first, which it waits for
    assert found.exposed == {"data_parallel": 1 + 3}
    assert found.phases == {"backward": 5, "clipping": 4}


def test_fused_operations_move_less() -> None:
    moves = Operation("other operations", "forward", torch.float32, 0, 0, 5, 2, False)
    assert schedule([moves], MACHINE, STRIDES).computing == {"other operations": 5}
    assert schedule([moves], MACHINE, STRIDES, compiled=True).computing == {"other operations": 2}


def test_an_operation_takes_the_longer_of_computing_and_moving() -> None:
    for executed, nbytes, seconds in ((7, 2, 7), (2, 7, 7), (0, 7, 7)):
        each = Operation("attention", "forward", torch.float32, 2 * executed, executed, nbytes, nbytes, True)
        assert MACHINE.seconds(each) == seconds
        assert replace(MACHINE, kernel=1.0).seconds(each) == seconds + 1
        found = schedule([each], MACHINE, STRIDES)
        assert found.flops == 2 * executed
