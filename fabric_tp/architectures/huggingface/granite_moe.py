from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fabric_tp.architectures.architecture import Experts, FeedForward, Fused, Stacked
from fabric_tp.architectures.huggingface.description import BLOCK, HUGGINGFACE


def _gate_and_up(feed_forward: nn.Module) -> Mapping[str, int]:
    module: Any = feed_forward
    return dict.fromkeys(("gate", "up"), module.input_linear.out_features // 2)


def _stacked(experts: nn.Module) -> Mapping[str, Stacked]:
    return {"input_linear.weight": Stacked(1, ("gate", "up")), "output_linear.weight": Stacked(2)}


GRANITE_MOE = replace(
    HUGGINGFACE,
    name="granite_moe",
    description="a Transformers GraniteMoe, with or without a shared MLP",
    block=replace(
        BLOCK,
        feed_forward=FeedForward(
            name="shared_mlp",
            inputs=(),
            fused={"input_linear": Fused(_gate_and_up, "consecutive")},
            outputs=("output_linear",),
        ),
        experts=Experts(name="block_sparse_moe", router="router", experts="", stacked=_stacked),
    ),
    tested=(),
)
