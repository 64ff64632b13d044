"""Transformers: the description of its causal language models, and, beside it, all else that knows them."""

from fabric_tp.architectures.huggingface.description import BLOCK, HUGGINGFACE

__all__ = ["BLOCK", "HUGGINGFACE"]
