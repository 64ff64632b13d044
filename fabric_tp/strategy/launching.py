"""One script for ``fabric run``, ``torchrun``, ``srun`` and plain ``python``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

Size = int | Literal["auto"] | None
"""A number of ranks; ``"auto"`` and ``None`` leave it to the other size and to the processes."""


@dataclass(frozen=True)
class Launcher:
    """What has started, or will start, the processes of this script: see :func:`detect`."""

    name: Literal["fabric run", "torchrun", "slurm", "python"]
    processes: int
    """Of all machines together."""
    nodes: int
    """Machines, with equally many processes each."""
    accelerator: Literal["cuda", "cpu"]
    data_parallel_size: int
    tensor_parallel_size: int
    fabric_arguments: dict[str, Any]
    """What ``lightning.Fabric`` needs to be given under this launcher: ``fabric run`` forbids what Fabric cannot do
    without under the others."""


def launch(
    strategy: Strategy | str = "tensor_parallel", *, launcher: Launcher | None = None, **fabric_arguments: Any
) -> L.Fabric:
    """Make a ``lightning.Fabric`` whose processes run, whichever launcher starts this script.

    On the CPU, the processes of a machine share its cores: torch gets no more threads than that leaves.

    Args:
        strategy: By default a :class:`fabric_tp.TensorParallelStrategy` without options, by its name.
        launcher: What :func:`detect` has returned. By default it is asked, with the sizes of the strategy.
        fabric_arguments: Anything else for ``lightning.Fabric``, such as ``loggers`` or ``precision``. ``accelerator``,
            ``devices`` and ``num_nodes`` are only needed under plain ``python``, and there only to differ from what
            :func:`detect` does.

    Raises:
        ValueError: See :func:`detect`.

    Example::

        strategy = fabric_tp.TensorParallelStrategy(fabric_tp.litgpt(), tensor_parallel_size=4, data_parallel_size=2)
        fabric = fabric_tp.launch(strategy, precision="bf16-mixed")
    """
    chosen = {
        name: fabric_arguments.pop(name) for name in ("accelerator", "devices", "num_nodes") & fabric_arguments.keys()
    }
    if launcher is None:
        sizes = (getattr(strategy, f"_{name}_parallel_size", None) for name in ("data", "tensor"))
        launcher = detect(*sizes, **chosen)
    elif chosen:
        raise ValueError(f"Give {', '.join(sorted(chosen))} to fabric_tp.launching.detect(), which made the launcher.")
    fabric = L.Fabric(strategy=strategy, **launcher.fabric_arguments, **fabric_arguments)
    if launcher.name != "fabric run":  # under which Fabric() has done it
        fabric.launch()
    if fabric.device.type == "cpu":
        share = _available_cores() // (launcher.processes // launcher.nodes)
        torch.set_num_threads(max(1, min(torch.get_num_threads(), share)))
    return fabric


def detect(
    data_parallel_size: Size = None,
    tensor_parallel_size: Size = None,
    *,
    accelerator: str = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: int | None = None,
) -> Launcher:
    """Find out how this script was started, and whether its processes are as many as they have to be.

    This needs no process group, so that a script can check whatever else may be wrong before processes meet. Plain
    ``python`` starts the processes itself: ``devices`` of them on each machine, by default as many as both sizes need,
    or one for each visible GPU if a size is left open.

    Args:
        data_parallel_size: See :func:`resolve_sizes`.
        tensor_parallel_size: See :func:`resolve_sizes`.
        accelerator: ``"cuda"``, ``"gpu"``, ``"cpu"``, or ``"auto"``: GPUs if any are visible.
        devices: As in ``lightning.Fabric``: how many on each machine, or which.
        num_nodes: Machines.

    Raises:
        ValueError: The sizes, ``devices`` or ``num_nodes`` do not fit the processes that were started; machines differ
            in their number of processes; or there are fewer GPUs than processes.
    """
    accelerator = _accelerator(accelerator)
    started = _started()
    asked = _devices_to_use(devices, accelerator)
    if started is None:
        name: Any = "python"
        nodes = num_nodes or 1
        local = asked or _needed(data_parallel_size, tensor_parallel_size, nodes, accelerator)
        _check_started_by_hand(nodes * local)
    else:
        name, nodes, local = started
        _check_asked_for(started, num_nodes, asked)
    sizes = resolve_sizes(data_parallel_size, tensor_parallel_size, nodes * local, nodes)
    if accelerator == "cuda" and local > _visible_gpus(accelerator):
        raise ValueError(
            f"data_parallel_size x tensor_parallel_size = {sizes[0]} x {sizes[1]} takes {local} GPUs on each machine,"
            f' but {_visible_gpus(accelerator)} are visible here. Use at most as many processes, or accelerator="cpu".'
        )
    arguments: dict[str, Any] = {}
    if name != "fabric run":
        arguments = {"accelerator": accelerator, "devices": local if devices == "auto" else devices, "num_nodes": nodes}
    return Launcher(name, nodes * local, nodes, accelerator, *sizes, arguments)  # type: ignore[arg-type]


def _needed(data_parallel_size: Size, tensor_parallel_size: Size, nodes: int, accelerator: str) -> int:
    """Processes on each machine: as many as both sizes need, or, if one is open, at least one for each GPU."""
    data, tensor = _given(data_parallel_size), _given(tensor_parallel_size)
    needed = -(-(data or 1) * (tensor or 1) // nodes)
    return needed if data is not None and tensor is not None else max(_visible_gpus(accelerator), needed)


def _check_started_by_hand(processes: int) -> None:
    world = os.environ.get("WORLD_SIZE")
    if "LOCAL_RANK" in os.environ and world is not None and int(world) != processes:
        raise ValueError(
            f"LOCAL_RANK is set, so Fabric starts no processes, and there are WORLD_SIZE={world} of them; but"
            f" {processes} were asked for."
        )


def _check_asked_for(started: tuple[str, int, int], num_nodes: int | None, local: int | None) -> None:
    name, nodes, processes = started
    wanted_nodes, wanted = num_nodes or nodes, local or processes
    if (wanted_nodes, wanted) != (nodes, processes):
        raise ValueError(
            f"num_nodes={wanted_nodes} and devices={wanted} were asked for, but {name} has started {processes}"
            f" processes on each of {nodes} machines. Leave these arguments out, or change what {name} is given."
        )


def resolve_sizes(
    data_parallel_size: Size, tensor_parallel_size: Size, processes: int, nodes: int = 1
) -> tuple[int, int]:
    """The two sizes as numbers: one that is left open is what the other leaves of the ``processes``.

    If both are open, a tensor-parallel group is all processes of a machine, as in ``ModelParallelStrategy``.

    Raises:
        ValueError: A size is below 1, or their product is not ``processes``. The message lists the sizes that work.
    """
    data, tensor = _given(data_parallel_size), _given(tensor_parallel_size)
    for name, size in (("data_parallel_size", data), ("tensor_parallel_size", tensor)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1.")
    if data is None and tensor is None:
        data = nodes
    tensor = tensor or max(1, processes // (data or 1))
    data = data or max(1, processes // tensor)
    if data * tensor != processes:
        works = ", ".join(f"{processes // n} x {n}" for n in range(1, processes + 1) if processes % n == 0)
        raise ValueError(
            f"data_parallel_size x tensor_parallel_size = {data} x {tensor} = {data * tensor}, but there are"
            f" {processes} processes. These work: {works}."
        )
    return data, tensor


def _given(size: Size) -> int | None:
    return None if size is None or size == "auto" else int(size)


def _started() -> tuple[str, int, int] | None:
    """The launcher that has started the processes, its machines, and the processes on each; None for plain python."""
    env = os.environ
    if env.get("LT_CLI_USED") == "1" or TorchElasticEnvironment.detect():
        name = "fabric run" if env.get("LT_CLI_USED") == "1" else "torchrun"
        processes = int(env.get("WORLD_SIZE", 1))
        local = int(env.get("LOCAL_WORLD_SIZE", processes))
        nodes = int(env.get("GROUP_WORLD_SIZE", processes // local))
        if nodes * local != processes:
            raise ValueError(
                f"{name} has started WORLD_SIZE={processes} processes on {nodes} machines, LOCAL_WORLD_SIZE={local} of"
                " them here. Start the same number on each machine."
            )
        if env.get("LT_DEVICES") == "auto" and (visible := _visible_gpus(_accelerator("auto"))) > 1:
            raise ValueError(f"fabric run --devices auto starts one process only. Say how many: --devices {visible}.")
        return name, nodes, local
    if SLURMEnvironment.detect():
        processes, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", 1))
        per_node = env.get("SLURM_NTASKS_PER_NODE", "1" if processes == 1 else None)
        if per_node is None or int(per_node) * nodes != processes:
            example = max(1, processes // nodes)
            raise ValueError(
                f"Slurm has SLURM_NTASKS={processes} tasks on SLURM_NNODES={nodes} machines with"
                f" SLURM_NTASKS_PER_NODE={per_node or 'not set'}. Start the same number on each machine and say so:"
                f" srun --nodes={nodes} --ntasks-per-node={example}."
            )
        return "slurm", nodes, int(per_node)
    return None


def _accelerator(accelerator: str) -> Literal["cuda", "cpu"]:
    chosen = os.environ.get("LT_ACCELERATOR", accelerator)  # by `fabric run`
    if {accelerator, chosen} in ({"cuda", "cpu"}, {"gpu", "cpu"}):
        raise ValueError(f"accelerator={accelerator!r} was asked for, but fabric run has --accelerator {chosen}.")
    if chosen == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if chosen not in ("cuda", "gpu", "cpu"):
        raise ValueError(f'accelerator={chosen!r}: tensor parallelism runs on "cuda" ("gpu") and "cpu".')
    return "cpu" if chosen == "cpu" else "cuda"


def _visible_gpus(accelerator: str) -> int:
    return torch.cuda.device_count() if accelerator == "cuda" else 0


def _devices_to_use(devices: int | str | list[int], accelerator: str) -> int | None:
    """How many ``devices`` are, in Fabric's way of counting; None for ``"auto"``."""
    if devices == "auto":
        return None
    try:
        parse: Any = CPUAccelerator.parse_devices if accelerator == "cpu" else CUDAAccelerator.parse_devices
        parsed = parse(devices)
    except (MisconfigurationException, TypeError) as error:
        raise ValueError(
            f"devices={devices!r} cannot be had with {_visible_gpus(accelerator)} GPUs: {error}"
        ) from error
    count = parsed if isinstance(parsed, int) else len(parsed or ())
    if count < 1:
        raise ValueError(f"devices={devices!r} must be at least one.")
    return count


def _available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
