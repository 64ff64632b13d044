"""AdamW and its learning rate."""

import math

import torch
from arguments import Args
from torch import nn


def make_optimizer(args: Args, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)


def learning_rate(args: Args, step: int) -> float:
    """Linear warm-up, then a cosine; steps count from 1."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
