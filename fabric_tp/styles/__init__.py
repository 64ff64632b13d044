"""How one module is stored and computed on one tensor-parallel rank; each file is one style."""

from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.dropout import Dropout, RandomHeads, RandomUnsharded
from fabric_tp.styles.embedding import VocabParallelEmbedding
from fabric_tp.styles.fused import FusedColwise
from fabric_tp.styles.head import LMHead
from fabric_tp.styles.head_norm import AllHeadsNorm
from fabric_tp.styles.heads import Heads, ShardHeads, SharedHeads
from fabric_tp.styles.low_rank import LowRankColwise, LowRankFused, LowRankHead, LowRankRowwise
from fabric_tp.styles.prepare import PrepareInput, PrepareInputOutput, ScatterInput, Unsharded
from fabric_tp.styles.replicated import Replicated
from fabric_tp.styles.residual import ParallelResidual
from fabric_tp.styles.rowwise import Rowwise
from fabric_tp.styles.style import Layout, Style

__all__ = [
    "AllHeadsNorm",
    "Colwise",
    "Dropout",
    "FusedColwise",
    "Heads",
    "LMHead",
    "Layout",
    "LowRankColwise",
    "LowRankFused",
    "LowRankHead",
    "LowRankRowwise",
    "ParallelResidual",
    "PrepareInput",
    "PrepareInputOutput",
    "RandomHeads",
    "RandomUnsharded",
    "Replicated",
    "Rowwise",
    "ScatterInput",
    "ShardHeads",
    "SharedHeads",
    "Style",
    "Unsharded",
    "VocabParallelEmbedding",
]
