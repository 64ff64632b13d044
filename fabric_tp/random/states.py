"""The states of all random number generators, as a checkpoint can hold them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from fabric_tp.styles.random_module import run_position


def get_state(model: nn.Module) -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch (CPU and the model's device), and of the model's dropout.

    Tensors, numbers and lists only: what ``torch.load(..., weights_only=True)`` loads. The dropout's is the same on
    all ranks and on every mesh, and so are the generators' if all ranks drew equally from them.

    Example::

        fabric.save(path, {"model": model, "random": fabric_tp.random.get_state(model)})
    """
    version, python, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": [version, list(python), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    device = _device(model)
    if device.type not in ("cpu", "meta"):
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    position = run_position(model)
    if position is not None:
        state["dropout"] = position.state_dict()
    return state


def set_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Continue from what :func:`get_state` returned, on this or on another mesh.

    The state of a device's generator is left out where the device is another one. Where the saved model had no
    dropout, the position of this one's stays what it is.
    """
    position = run_position(model)
    if position is not None and "dropout" in state:
        position.load_state_dict(state["dropout"])
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    numpy = state["numpy"]
    key = numpy["key"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    device = _device(model)
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu(), device)


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
