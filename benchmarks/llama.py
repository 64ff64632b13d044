"""What the benchmarks compare on: a Llama in Meta's names, and the plan a user writes from torch's styles.

The plan is the one of torch's tensor-parallel tutorial: sequence-parallel norms, one gather per attention and MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from litgpt import GPT, Config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import fabric_tp


@dataclass(frozen=True)
class Shape:
    layers: int = 8
    width: int = 256
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 704
    vocabulary: int = 2048
    batch: int = 1
    length: int = 128


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.width // shape.heads
        self.wq = nn.Linear(shape.width, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(shape.width, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(shape.width, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * self.head_dim, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = rotate(self.wq(x).view(b, s, self.n_heads, self.head_dim), cos, sin).transpose(1, 2)
        k = rotate(self.wk(x).view(b, s, self.n_kv_heads, self.head_dim), cos, sin).transpose(1, 2)
        v = self.wv(x).view(b, s, self.n_kv_heads, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(b, s, self.n_heads * self.head_dim))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.width, shape.hidden, bias=False)
        self.w2 = nn.Linear(shape.hidden, shape.width, bias=False)
        self.w3 = nn.Linear(shape.width, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape)
        self.attention_norm = nn.RMSNorm(shape.width)
        self.ffn_norm = nn.RMSNorm(shape.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.output = nn.Linear(shape.width, shape.vocabulary, bias=False)
        half = shape.width // shape.heads // 2
        angles = torch.outer(torch.arange(shape.length), 10000 ** (-torch.arange(half) / half))[None, :, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.output(self.norm(x))


def torch_plan(model: Llama, mesh: DeviceMesh) -> nn.Module:
    """The model on torch's own styles."""
    whole, sequence = Replicate(), Shard(1)
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=whole, output_layouts=sequence),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=sequence, output_layouts=Shard(-1), use_local_output=False),
        "layers.*.attention_norm": SequenceParallel(),
        "layers.*.attention": PrepareModuleInput(
            input_layouts=(sequence, None, None), desired_input_layouts=(whole, None, None)
        ),
        "layers.*.attention.wq": ColwiseParallel(),
        "layers.*.attention.wk": ColwiseParallel(),
        "layers.*.attention.wv": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(output_layouts=sequence),
        "layers.*.ffn_norm": SequenceParallel(),
        "layers.*.feed_forward": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(whole,)),
        "layers.*.feed_forward.w1": ColwiseParallel(),
        "layers.*.feed_forward.w3": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(output_layouts=sequence),
    }
    for layer in model.layers:
        attention = layer.attention
        assert isinstance(attention, Attention)
        attention.n_heads //= mesh.size()
        attention.n_kv_heads //= mesh.size()
    return parallelize_module(model, mesh, plan)


Step = Callable[[], None]


def step(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], shape: Shape, whole: bool) -> Step:
    """Forward, loss and backward; if ``whole``, clipping and AdamW too, without which no gradient is of use."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(shape.vocabulary, (2, shape.batch, shape.length), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        loss(model(tokens), targets).backward()
        if whole:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return run


def one_device_step(shape: Shape, whole: bool) -> Step:
    return step(Llama(shape), _flat_cross_entropy, shape, whole)


def fabric_tp_step(shape: Shape, whole: bool, mesh: DeviceMesh, **options: Any) -> Step:
    """With these options of :func:`fabric_tp.llama`."""
    return step(fabric_tp.llama(verify=False, **options)(Llama(shape), mesh), fabric_tp.cross_entropy, shape, whole)


def litgpt_config(shape: Any, **more: Any) -> Config:
    """Of a Llama with these layers, width, heads, kv_heads, hidden features and vocabulary."""
    return Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        n_query_groups=shape.kv_heads,
        intermediate_size=shape.hidden,
        padded_vocab_size=shape.vocabulary,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        **more,
    )


def litgpt_step(shape: Shape, whole: bool, mesh: DeviceMesh, **options: Any) -> Step:
    """The same shape as litgpt's model, with these options of :func:`fabric_tp.litgpt`."""
    config = litgpt_config(shape, block_size=shape.length)
    model = fabric_tp.litgpt(**options)(GPT(config), mesh)
    return step(model, fabric_tp.cross_entropy, shape, whole)


def transformers_step(shape: Shape, whole: bool, mesh: DeviceMesh, directory: Path) -> Step:
    """The same shape as Transformers' model, which :func:`save_transformers` has saved, with its own ``tp_plan``."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory, tp_plan="auto", device_mesh=mesh, dtype=torch.float32)

    def loss(output: Any, targets: Tensor) -> Tensor:
        return _flat_cross_entropy(output.logits, targets)

    return step(model, loss, shape, whole)


def save_transformers(shape: Shape, directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.hidden,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.length,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def torch_plan_step(shape: Shape, whole: bool, mesh: DeviceMesh) -> Step:
    run = step(torch_plan(Llama(shape), mesh), _flat_cross_entropy, shape, whole)
    return partial(_with_loss_parallel, run)


def _with_loss_parallel(run: Step) -> None:
    with loss_parallel():
        run()


def _flat_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
