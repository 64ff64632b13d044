"""litgpt: the description of its models, and, beside it, all else that knows them."""

from fabric_tp.architectures.litgpt.description import LITGPT

__all__ = ["LITGPT"]
