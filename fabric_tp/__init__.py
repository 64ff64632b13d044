"""Tensor, sequence and loss parallelism for Lightning Fabric, for unmodified models.

Where what is, from the ground up; no folder imports from one below it in this list:

====================  ===============================================================================================
``architectures/``    what models look like, as plain data: a file a family; all that knows litgpt or Transformers
``autograd/``         plain tensors and autograd functions: collectives, linear layers, norms, activations, dropout
``loss/``             cross-entropy of sharded logits, and of logits that are never whole
``styles/``           how one module is stored and computed on one rank: a file a style; start with its README
``plan/``             which module gets which style: derived from an architecture, checked, applied, shown
``random/``           initial parameters and random states that are the same on any mesh
``parallelize/``      the factories, and the order of the steps: plan, checkpointing, compile, FSDP2, partial gradients
``generation/``       text from a model, with a cache of keys and values that is sharded by heads
``checkpoint/``       litgpt's and the hub's files, by shards; conversions; replacing so that a crash loses nothing
``data/``             identical batches on the ranks that share a model
``strategy/``         all that Fabric meets: strategy, launching, failure, precision, clipping, optimizers
``measure/``          memory and communication of a step: counted, estimated, fitted to a card
``testing/``          is a model the same in parallel as on one device?
====================  ===============================================================================================

``cli.py`` is the command ``fabric-tp``; ``_torch.py`` holds all that is private to torch, ``mesh.py``, ``seeds.py``,
``shards.py`` and ``wrapping.py`` what several folders need.
"""

import sys

from lightning.fabric.strategies import STRATEGY_REGISTRY

from fabric_tp import checkpoint, data, random, styles, testing
from fabric_tp.architectures import lean
from fabric_tp.generation import generate, generate_stream
from fabric_tp.loss import count_targets, cross_entropy, linear_cross_entropy
from fabric_tp.measure import estimate, memory
from fabric_tp.parallelize import Parallelize, auto, feed_forward, from_plan, litgpt, llama
from fabric_tp.strategy import TensorParallelStrategy, clip, launch, launching, optimizer
from fabric_tp.styles.quantized import dequantize

__version__ = "0.1.0"

__all__ = [
    "Parallelize",
    "TensorParallelStrategy",
    "auto",
    "checkpoint",
    "count_targets",
    "cross_entropy",
    "data",
    "dequantize",
    "estimate",
    "feed_forward",
    "from_plan",
    "generate",
    "generate_stream",
    "launch",
    "linear_cross_entropy",
    "litgpt",
    "llama",
    "optimizer",
    "random",
    "styles",
    "testing",
]

STRATEGY_REGISTRY.register(
    "tensor_parallel", TensorParallelStrategy, description="Tensor parallelism with FSDP2", override=True
)

for _module in (clip, launching, lean, memory, optimizer):  # where they were once documented to be
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
