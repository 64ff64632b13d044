"""How one module is stored and computed on one tensor-parallel rank; each file is one style."""

from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.embedding import VocabParallelEmbedding
from fabric_tp.styles.fused import FusedColwise
from fabric_tp.styles.head import LMHead
from fabric_tp.styles.prepare import PrepareInput, ShardHeads
from fabric_tp.styles.replicated import Replicated
from fabric_tp.styles.rowwise import Rowwise
from fabric_tp.styles.style import Layout, Style

__all__ = [
    "Colwise",
    "FusedColwise",
    "LMHead",
    "Layout",
    "PrepareInput",
    "Replicated",
    "Rowwise",
    "ShardHeads",
    "Style",
    "VocabParallelEmbedding",
]
