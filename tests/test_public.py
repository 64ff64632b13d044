"""The package's face: names and module paths that people have been told of."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import fabric_tp
from tests.programs import environment

PATHS = {
    "fabric_tp": fabric_tp.__all__,
    "fabric_tp.architectures": ["Architecture", "Attention", "Block", "Experts", "FeedForward", "Fused", "HeadCounts"],
    "fabric_tp.checkpoint": ["litgpt", "replacing"],
    "fabric_tp.checkpoint.litgpt": ["load", "save"],
    "fabric_tp.clip": ["clip_grad_norm", "clip_grad_value"],
    "fabric_tp.generation": ["generate", "generate_stream"],
    "fabric_tp.data": ["Inputs", "SeededSamples"],
    "fabric_tp.launching": ["Launcher", "detect", "launch", "resolve_sizes"],
    "fabric_tp.lean": ["TORCH"],
    "fabric_tp.loss": ["count_targets", "cross_entropy", "linear_cross_entropy"],
    "fabric_tp.memory": ["MemoryTracker"],
    "fabric_tp.optimizer": ["local"],
    "fabric_tp.parallelize": ["Parallelize", "auto", "feed_forward", "from_plan", "litgpt", "llama"],
    "fabric_tp.random": ["broadcast", "get_state", "initialize", "set_state", "shared_seed"],
    "fabric_tp.strategy": ["TensorParallelStrategy"],
    "fabric_tp.styles": ["Colwise", "Heads", "Layout", "Replicated", "Rowwise", "Style", "VocabParallelEmbedding"],
    "fabric_tp.testing": ["assert_replicas_in_sync", "check_parity", "next_token_loss"],
}


@pytest.mark.parametrize("path", PATHS)
def test_path(path) -> None:
    module = importlib.import_module(path)
    assert [name for name in PATHS[path] if not hasattr(module, name)] == []


def test_import_brings_all_namespaces_and_not_litgpt() -> None:
    """Which takes seconds to import, and not everybody has such a model."""
    code = "import fabric_tp, sys; fabric_tp.testing.check_parity; sys.exit('litgpt' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_options_are_documented_for_help() -> None:
    options = {name for name, field in fabric_tp.litgpt.__dataclass_fields__.items() if field.init}
    documented = {line.strip().split(":")[0] for line in (fabric_tp.litgpt.__doc__ or "").splitlines()}
    assert options <= documented
