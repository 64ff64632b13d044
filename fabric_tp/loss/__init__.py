"""Cross-entropy of logits that are sharded over the vocabulary, or that need not be computed for it.

A file imports from those below it only:

=====================  ==============================================================================================
``functional.py``      ``cross_entropy`` and ``linear_cross_entropy``: what they take and check, which way they take
``vocab_parallel.py``  one way through the logits: they exist, each rank holding its columns
``fused.py``           the other: they are computed, a chunk of rows at a time, and turned into gradients on the spot
``deferred.py``        logits that an LM head has left to whoever looks at them
``formula.py``         the loss of a row and its gradient, from four numbers of the row
``targets.py``         how many targets count, and where each is among a rank's columns
``options.py``         the options of both functions
=====================  ==============================================================================================
"""

from fabric_tp.loss.functional import cross_entropy, linear_cross_entropy
from fabric_tp.loss.targets import count_targets

__all__ = ["count_targets", "cross_entropy", "linear_cross_entropy"]
