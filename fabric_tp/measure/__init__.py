"""What a step takes: memory and bytes on the wire, counted on real ranks or estimated before there are any."""

from fabric_tp.measure.estimation import Estimate, estimate
from fabric_tp.measure.fit import cheapest, fit
from fabric_tp.measure.hardware import CARDS, Hardware, Link, load_hardware
from fabric_tp.measure.prediction import Prediction, predict
from fabric_tp.measure.step import count_step
from fabric_tp.mesh import fake_mesh, fake_tensors

__all__ = [
    "CARDS",
    "Estimate",
    "Hardware",
    "Link",
    "Prediction",
    "cheapest",
    "count_step",
    "estimate",
    "fake_mesh",
    "fake_tensors",
    "fit",
    "load_hardware",
    "predict",
]
