"""Cross-entropy of logits that are sharded over the vocabulary, or that need not be computed for it."""

from fabric_tp.loss.vocab_parallel import count_targets, cross_entropy, linear_cross_entropy

__all__ = ["count_targets", "cross_entropy", "linear_cross_entropy"]
