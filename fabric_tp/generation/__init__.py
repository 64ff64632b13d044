"""Text from a model: prompts are continued token by token, with keys and values kept by the rank that has their heads.

``continuation.py`` has the public functions and their loop. What is kept of the tokens that a model has seen is for its
architecture to say (``fabric_tp/architectures/cache.py``). ``decoding.py`` turns sequence parallelism off meanwhile,
``sampling.py`` chooses from sharded logits, ``stopping.py`` ends a continuation, ``prompts.py`` checks what is given.
"""

from fabric_tp.generation.continuation import generate, generate_stream

__all__ = ["generate", "generate_stream"]
