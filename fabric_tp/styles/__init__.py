"""How one module is stored and computed on one tensor-parallel rank; each file is one style, and a README shows all.

The tables in the docstrings give the shapes on one of t ranks (b samples, s tokens, h features between the layers, f
within them, v tokens in the vocabulary, d features of a head), the collectives of forward and backward in their order,
and what has a gradient that is a partial sum on each rank. Tests read them, and compare them with what runs.
"""

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.attention_heads import ShardHeads
from fabric_tp.styles.colwise import Colwise
from fabric_tp.styles.dropout import Dropout
from fabric_tp.styles.fused_colwise import FusedColwise
from fabric_tp.styles.gather_output import GatherOutput
from fabric_tp.styles.head_bias import HeadBias
from fabric_tp.styles.heads import Heads
from fabric_tp.styles.lm_head import LMHead
from fabric_tp.styles.low_rank_colwise import LowRankColwise
from fabric_tp.styles.low_rank_fused import LowRankFused
from fabric_tp.styles.low_rank_head import LowRankHead
from fabric_tp.styles.low_rank_rowwise import LowRankRowwise
from fabric_tp.styles.parallel_residual import ParallelResidual
from fabric_tp.styles.prepare_input import PrepareInput
from fabric_tp.styles.prepare_input_output import PrepareInputOutput
from fabric_tp.styles.qk_norm import AllHeadsNorm
from fabric_tp.styles.random_heads import RandomHeads
from fabric_tp.styles.random_replicated import RandomReplicated
from fabric_tp.styles.random_unsharded import RandomUnsharded
from fabric_tp.styles.replicated import Replicated
from fabric_tp.styles.rowwise import Rowwise
from fabric_tp.styles.scatter_input import ScatterInput
from fabric_tp.styles.shared_heads import SharedHeads
from fabric_tp.styles.stacked_experts import StackedExperts
from fabric_tp.styles.style import Style
from fabric_tp.styles.unsharded import Unsharded
from fabric_tp.styles.vocab_parallel_embedding import VocabParallelEmbedding

__all__ = [
    "AllHeadsNorm",
    "Colwise",
    "Dropout",
    "FusedColwise",
    "GatherOutput",
    "HeadBias",
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
    "RandomReplicated",
    "RandomUnsharded",
    "Replicated",
    "Rowwise",
    "ScatterInput",
    "ShardHeads",
    "SharedHeads",
    "StackedExperts",
    "Style",
    "Unsharded",
    "VocabParallelEmbedding",
]
