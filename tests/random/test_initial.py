"""Initial parameters from the meta device: the seed's, on any mesh, by each module's own function."""

from __future__ import annotations

import hashlib
import math
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from litgpt import GPT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fabric_tp
from fabric_tp.checkpoint.parts import whole_tensors
from fabric_tp.shards import gather_shards
from fabric_tp.styles import Colwise, Replicated
from fabric_tp.testing.ranks import mesh
from fabric_tp.testing.small import small_causal
from tests.models import litgpt_config

MESHES = [(1, 2), (2, 1), (1, 4), (2, 2), (4, 1)]


def from_meta(name: str, sizes: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Only the first rank has this seed."""
    torch.manual_seed(seed + dist.get_rank())
    with torch.device("meta"):
        model = GPT(litgpt_config(name)).to(dtype)
    return fabric_tp.litgpt()(model, mesh(*sizes))


def digests(name: str, sizes: tuple[int, int], seed: int) -> dict[str, str]:
    """A hash of each whole parameter and buffer."""
    model = from_meta(name, sizes, seed)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: digest(gather_shards(tensor)) for name, tensor in tensors.items()}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.swept(lambda p: p["sizes"] == (4, 1))
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", ["Llama-3-8B", "pythia-14m"])
def test_same_on_every_mesh(pool, name, sizes) -> None:
    assert pool(sizes[0] * sizes[1])(digests, name, sizes, 7) == pool(1)(digests, name, (1, 1), 7)


def digests_of_transformers(model_type: str, sizes: tuple[int, int]) -> dict[str, str]:
    torch.manual_seed(7)
    real = small_causal(model_type)
    with torch.device("meta"):
        model = type(real)(real.config)
    return {
        name: digest(whole.gather()) for name, whole in whole_tensors(fabric_tp.auto()(model, mesh(*sizes))).items()
    }


@pytest.mark.swept(lambda p: p["model_type"] != "gpt2")
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral", "phi3"])
def test_transformers_own_initial_values(pool, model_type) -> None:
    """Parts that lie side by side in rows; experts in one parameter."""
    assert pool(2)(digests_of_transformers, model_type, (1, 2)) == pool(1)(digests_of_transformers, model_type, (1, 1))


def test_another_seed_gives_other_parameters(pool) -> None:
    one, other = (pool(1)(digests, "Llama-3-8B", (1, 1), seed) for seed in (7, 8))
    different = {name for name in one if one[name] != other[name]}
    assert different == {name for name in one if "norm" not in name and "ln_f" not in name} - {"cos", "sin"}


def test_parameters_of_one_shape_differ(pool) -> None:
    of = pool(2)(digests, "Llama-3-8B", (1, 2), 7)
    matrices = [digest for name, digest in of.items() if "norm" not in name and "ln_f" not in name]
    assert len(set(matrices)) == len(matrices)


def assert_shards_differ(sizes: tuple[int, int]) -> None:
    model = from_meta("Llama-3-8B", sizes, 7)
    for name, parameter in model.named_parameters():
        local = parameter._local_tensor.detach()
        others = [torch.empty_like(local) for _ in range(4)]
        dist.all_gather(others, local)
        split = [axis for axis, placement in enumerate(parameter.placements) if not placement.is_replicate()]
        expected = math.prod(parameter.device_mesh.size(axis) for axis in split) if "norm" not in name else 1
        assert len({digest(other) for other in others}) == (1 if "ln_f" in name else expected), name


@pytest.mark.parametrize("sizes", [(1, 4), (2, 2), (4, 1)], ids=str)
def test_shards_differ(pool, sizes) -> None:
    pool(4)(assert_shards_differ, sizes)


def assert_caller_state_is_kept() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.device("meta"):
        model = GPT(litgpt_config("Llama-3-8B"))
    fabric_tp.litgpt()(model, mesh(1, 2))
    assert torch.equal(torch.rand(3), expected)


def test_random_state_of_the_caller_is_kept(pool) -> None:
    pool(2)(assert_caller_state_is_kept)


def gpt_neox_init(model: GPT) -> None:
    """As ``litgpt.pretrain.initialize_weights`` does it: functions on the instances."""
    width, layers = model.config.n_embd, model.config.n_layer

    def init_weights(module: Any, std: float) -> None:
        nn.init.normal_(module.weight, mean=0.0, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, (nn.Embedding, nn.Linear)):
            module.reset_parameters = partial(init_weights, module, std=math.sqrt(2.0 / 5 / width))
    for block in modules[0].transformer.h:
        for module in (block.attn, block.mlp):
            module.proj.reset_parameters = partial(init_weights, module.proj, std=1 / math.sqrt(width) / layers)


def assert_std_as_asked(name: str, sizes: tuple[int, int]) -> None:
    with torch.device("meta"):
        model: Any = GPT(litgpt_config(name))
    gpt_neox_init(model)
    model = fabric_tp.litgpt()(model, mesh(*sizes))
    for name, parameter in model.named_parameters():
        whole = gather_shards(parameter)
        if name.endswith("bias") and "norm" not in name and "ln_f" not in name:
            assert not whole.any(), name
        if whole.dim() == 2:
            expected = 1 / math.sqrt(64) / 2 if "proj" in name else math.sqrt(2.0 / 5 / 64)
            assert abs(whole.std().item() / expected - 1) < 0.1, (name, whole.std().item(), expected)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("name", ["Llama-3-8B", "pythia-14m"])
def test_custom_init_is_honoured(pool, name, sizes) -> None:
    pool(2)(assert_std_as_asked, name, sizes)


def assert_buffers_of_a_real_model(sizes: tuple[int, int]) -> None:
    model, real = from_meta("Llama-3-8B", sizes, 7), GPT(litgpt_config("Llama-3-8B"))
    buffers = dict(model.named_buffers())
    assert set(buffers) == {"cos", "sin"}
    for name, expected in real.named_buffers():
        assert torch.equal(buffers[name], expected), name


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
def test_buffers(pool, sizes) -> None:
    pool(2)(assert_buffers_of_a_real_model, sizes)


class Scale(nn.Module):
    """A parameter and nothing to initialise it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def rejects_missing_reset_parameters() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), Scale())
    with pytest.raises(ValueError, match=r"1 \(.*Scale.*\) is on the meta device and has no reset_parameters"):
        fabric_tp.from_plan({"0": Colwise(), "1": Replicated()})(model, mesh(1, 2))


def test_missing_reset_parameters(pool) -> None:
    pool(2)(rejects_missing_reset_parameters)


class PeakMemory(TorchDispatchMode):
    """Elements of all tensors that are alive at once, off the meta device, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf._local_tensor if isinstance(leaf, DTensor) else leaf)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, elements = storage._cdata, storage.nbytes() // tensor.element_size()
        if tensor.is_meta or key in self.known:
            return
        self.known.add(key)
        self.live += elements
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, elements)

    def _remove(self, key: int, elements: int) -> None:
        self.known.discard(key)
        self.live -= elements


def peak_of_initialisation(sizes: tuple[int, int]) -> tuple[int, int, int, int]:
    """Peak, what stays, the largest module and the whole model, in elements."""
    with torch.device("meta"):
        model: Any = GPT(litgpt_config("Llama-3-8B", n_layer=6))
    whole = sum(parameter.numel() for parameter in model.parameters())
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    with PeakMemory() as memory:
        model = fabric_tp.litgpt()(model, mesh(*sizes))
    shards = sum(p._local_tensor.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    return memory.peak, shards, largest, whole


@pytest.mark.parametrize("sizes", [(1, 4), (2, 2), (4, 1)], ids=str)
def test_holds_one_whole_module_at_a_time(pool, sizes) -> None:
    peak, shards, largest, whole = pool(4)(peak_of_initialisation, sizes)
    assert shards < peak <= shards + 1.5 * largest < whole / 2


def assert_dtype_kept(sizes: tuple[int, int]) -> None:
    model = from_meta("Llama-3-8B", sizes, 7, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
def test_dtype_is_kept(pool, sizes) -> None:
    pool(2)(assert_dtype_kept, sizes)


def frozen_from_meta(sizes: tuple[int, int]) -> list[str]:
    with torch.device("meta"):
        model: Any = GPT(litgpt_config("Llama-3-8B"))
    for block in model.transformer.h:
        block.attn.requires_grad_(False)
    model = fabric_tp.litgpt()(model, mesh(*sizes))
    return sorted({name.split(".")[-2] for name, p in model.named_parameters() if not p.requires_grad})


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
def test_frozen_parameters_from_meta(pool, sizes) -> None:
    assert pool(2)(frozen_from_meta, sizes) == ["k", "proj", "q", "v"]


def assert_first_ranks_values(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    expected = GPT(litgpt_config("pythia-14m")).state_dict()
    torch.manual_seed(dist.get_rank())
    model = fabric_tp.litgpt()(GPT(litgpt_config("pythia-14m")), mesh(*sizes))
    for name, parameter in model.named_parameters():
        *start, part, own = name.split(".")
        if part in ("q", "k", "v"):
            whole = expected[".".join([*start, own])].chunk(3)["qkv".index(part)]
        else:
            whole = expected[name]
        assert torch.equal(gather_shards(parameter), whole), name


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_real_models_become_the_first_ranks(pool, sizes) -> None:
    pool(sizes[0] * sizes[1])(assert_first_ranks_values, sizes)


def assert_first_ranks_buffers(sizes: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("scale", torch.full((3,), float(dist.get_rank())))
    model = fabric_tp.from_plan({"0": Replicated()})(model, mesh(*sizes))
    assert torch.equal(model.get_buffer("scale"), torch.zeros(3))


def test_buffers_become_the_first_ranks(pool) -> None:
    pool(4)(assert_first_ranks_buffers, (2, 2))
