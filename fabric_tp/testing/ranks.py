"""Processes that stay, since starting them costs seconds each time."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fabric_tp import _torch

TIMEOUT = 300
UNCOLLECTED_GROUPS = 30
"""Groups destroyed between two runs of the garbage collector."""


def _spawn(rank: int, target: Callable[..., None], args: tuple) -> BaseProcess:
    process = mp.get_context("spawn").Process(target=target, args=args, daemon=True)
    process.start()
    return process


class Ranks:
    """Processes on the CPU: ``ranks(function, *args)`` runs it on each of them and returns what rank 0 returns.

    Process groups that the function has made are destroyed after it, except those of :func:`mesh`.

    Args:
        size: How many.
        start: Starts the process of a rank: ``start(rank, target, args)`` returns what has ``kill()``, ``join()`` and
            ``exitcode``.

    Raises:
        AssertionError: The function raised on some rank, whose traceback this shows; the processes are started anew.
    """

    def __init__(self, size: int, start: Callable[[int, Callable[..., None], tuple], Any] = _spawn) -> None:
        self.size, self._start_one = size, start
        self._start()

    def _start(self) -> None:
        store = os.path.join(tempfile.mkdtemp(), "store")
        pipes = [mp.get_context("spawn").Pipe() for _ in range(self.size)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            self._start_one(rank, _serve, (rank, self.size, store, theirs)) for rank, (_, theirs) in enumerate(pipes)
        ]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for connection in self._connections:
            connection.send((function, args, kwargs))
        answers: dict[int, Any] = {}
        while missing := [rank for rank in range(self.size) if rank not in answers]:
            ready = wait([self._connections[rank] for rank in missing], TIMEOUT)
            if not ready:
                self._fail(f"ranks {missing} gave no answer in {TIMEOUT} s")
            for rank in [rank for rank in missing if self._connections[rank] in ready]:
                try:
                    fine, answers[rank] = self._connections[rank].recv()
                except EOFError:
                    self._processes[rank].join()
                    self._fail(f"rank {rank} died, exit code {self._processes[rank].exitcode}")
                if not fine:
                    self._fail(f"rank {rank} failed\n{answers[rank]}")
        return answers[0]

    def _fail(self, message: str) -> NoReturn:
        self.stop()  # ranks may be left waiting for others in a collective
        self._start()
        raise AssertionError(message)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    warnings.filterwarnings("ignore")
    gc.freeze()  # what is imported is no garbage, and looking for some in it takes half a second each time
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, args, kwargs = connection.recv()
            try:
                answer = function(*args, **kwargs)
                _destroy_groups()
                connection.send((True, answer))
            except BaseException:
                connection.send((False, traceback.format_exc()))


_meshes: dict[tuple[int, int], DeviceMesh] = {}
_uncollected = 0


def mesh(data_parallel_size: int, tensor_parallel_size: int) -> DeviceMesh:
    """Fabric's mesh, once for each shape, on a rank.

    DTensor remembers the placements of results with the mesh of the first tensors that were equal, so that a mesh of
    the same shape must not take the place of one whose groups are gone.
    """
    shape = (data_parallel_size, tensor_parallel_size)
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=("data_parallel", "tensor_parallel"))
    return _meshes[shape]


def _destroy_groups() -> None:
    """Destroy the groups of no mesh that stays: the threads of each wake a hundred times a second."""
    global _uncollected
    dist.barrier()  # a rank may still be in a collective of theirs
    staying = {group for each in _meshes.values() for group in each.get_all_groups()}
    gone = [group for group in _torch.process_groups()[1:] if group not in staying]
    for group in gone:
        dist.destroy_process_group(group)
    _uncollected += len(gone)
    if _uncollected >= UNCOLLECTED_GROUPS:
        gc.collect()  # threads end with the group's last reference, which may be in a cycle
        _uncollected = 0
