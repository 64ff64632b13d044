"""The order of samples, and data that is not the recipe's own."""

import json
from pathlib import Path

import pytest
import torch
from arguments import Args, Sizes
from batches import GlobalBatchSampler, inputs_and_targets

from tests.programs import run_ranks

from .runs import losses


def steps(
    data_parallel_size: int, micro_batch_size: int, *, num_samples: int = 100, first_step: int = 0, num_steps: int = 10
) -> list[list[int]]:
    """The samples of each step, from all ranks."""
    accumulate = 24 // (data_parallel_size * micro_batch_size)
    result: list[list[int]] = [[] for _ in range(num_steps)]
    for rank in range(data_parallel_size):
        sampler = GlobalBatchSampler(
            num_samples,
            global_batch_size=24,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=data_parallel_size,
            seed=1,
            first_step=first_step,
            num_steps=num_steps,
        )
        micro_batches = list(sampler)
        assert len(micro_batches) == len(sampler) == num_steps * accumulate
        assert all(len(micro_batch) == micro_batch_size for micro_batch in micro_batches)
        for i, micro_batch in enumerate(micro_batches):
            result[i // accumulate] += [index for _, index in micro_batch]
    return [sorted(step) for step in result]


def test_samples_are_numbered_over_the_run() -> None:
    options = {"global_batch_size": 6, "data_parallel_size": 2, "seed": 0, "num_steps": 2, "first_step": 3}
    ranks = [GlobalBatchSampler(20, micro_batch_size=3, data_parallel_rank=rank, **options) for rank in (0, 1)]
    numbers = [[number for batch in rank for number, _ in batch] for rank in ranks]
    assert numbers == [[18, 20, 22, 24, 26, 28], [19, 21, 23, 25, 27, 29]]


@pytest.mark.parametrize(("data_parallel_size", "micro_batch_size"), [(1, 6), (2, 12), (2, 3), (3, 2), (4, 1)])
def test_a_step_sees_the_same_samples_on_any_mesh(data_parallel_size: int, micro_batch_size: int) -> None:
    assert steps(data_parallel_size, micro_batch_size) == steps(1, 24)


def test_an_epoch_sees_no_sample_twice() -> None:
    one, two = steps(1, 24, num_steps=8)[:4], steps(1, 24, num_steps=8)[4:]
    assert len({sample for step in one for sample in step}) == 4 * 24
    assert len({sample for step in two for sample in step}) == 4 * 24
    assert one != two


def test_resuming_continues_with_the_next_sample() -> None:
    whole = steps(2, 6, num_steps=10)
    for first_step in (1, 4, 7):
        assert steps(2, 6, first_step=first_step, num_steps=10 - first_step) == whole[first_step:]


def test_instruction_data_is_shifted_and_padded() -> None:
    sizes = Sizes(data_parallel=1, tensor_parallel=4, global_batch=2, micro_batch=2)
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 0, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 3, 4, 5, 6], [-100, 2, 3, -100, -100, -100]]),
    }
    inputs, targets = inputs_and_targets(Args(), sizes, batch)
    assert inputs.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert targets.tolist() == [[-100, 3, 4, 5, 6, *[-100] * 3], [2, 3, *[-100] * 6]]


def test_only_sequence_parallelism_needs_padding() -> None:
    sizes = Sizes(data_parallel=1, tensor_parallel=4, global_batch=1, micro_batch=1)
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[1, 2, 3, 4]])}
    inputs, _ = inputs_and_targets(Args(sequence_parallel=False), sizes, batch)
    assert inputs.tolist() == [[1, 2, 3]]


@pytest.mark.sweep
def test_instruction_data_from_a_checkpoint(folder: Path, run_1x1: Path) -> None:
    samples = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 41)]
    (folder / "samples.json").write_text(json.dumps(samples))
    instructions = ["--data", "litgpt.data.JSON", "--data.json_path", folder / "samples.json", "--data.num_workers", 0]
    instructions += ["--data.mask_prompt", "true", "--data.val_split_fraction", 0.25]
    instructions += ["--initial_checkpoint_dir", run_1x1 / "final", "--max_seq_length", 256, "--max_steps", 4]
    instructions += ["--global_batch_size", 8, "--micro_batch_size", 2]
    run_ranks(1, ["--out_dir", folder / "json-1x1", *instructions])
    run_ranks(2, ["--out_dir", folder / "json-2x1", "--data_parallel_size", 2, *instructions])
    torch.testing.assert_close(losses(folder / "json-2x1"), losses(folder / "json-1x1"), rtol=1e-4, atol=0)
    assert "Alpaca" in (folder / "json-2x1" / "final" / "prompt_style.yaml").read_text()


@pytest.mark.sweep
def test_streamed_data(folder: Path, run_1x1: Path) -> None:
    """Resumed on two ranks where one rank was, over more than one pass."""
    given = ["--data", "streamed.Streamed", "--initial_checkpoint_dir", run_1x1 / "final", "--max_seq_length", 64]
    given += ["--global_batch_size", 8, "--micro_batch_size", 4, "--max_steps", 8, "--save_interval", 3]
    run_ranks(1, ["--out_dir", folder / "streamed", *given])
    resume = ["--resume", folder / "streamed" / "step-00000003"]
    run_ranks(2, ["--out_dir", folder / "streamed-resumed", *given, *resume])
    torch.testing.assert_close(losses(folder / "streamed-resumed"), losses(folder / "streamed")[3:], rtol=1e-4, atol=0)
