"""The recipes on a directory of the hub, which nobody has converted."""

from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config

from tests.programs import RECIPES, finish, python, run_ranks, start
from tests.recipes.finetuning import finetune_options

COPIED = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def downloaded(run_1x1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the name and the shape of one of litgpt's configs, with random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    directory = tmp_path_factory.mktemp("hub") / "pythia-14m"
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50304, max_position_embeddings=512, **sizes))
    model.save_pretrained(directory, max_shard_size="20MB")
    for name in COPIED:
        (directory / name).write_bytes((run_1x1 / "final" / name).read_bytes())
    return directory


@pytest.mark.sweep
def test_fine_tuned_and_given_back(downloaded: Path, tmp_path: Path) -> None:
    """Adapters on two ranks, merged; litgpt's and Transformers' models of it are the same."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    given = finetune_options(
        downloaded, tmp_path / "out", "--lora", "true", "--export", "huggingface", "--max_steps", 2
    )
    run_ranks(2, given, "finetune")
    final = tmp_path / "out" / "final"
    gpt = GPT(Config.from_name("pythia-14m"))
    gpt.load_state_dict(torch.load(final / "lit_model.pth", weights_only=True))
    hub = AutoModelForCausalLM.from_pretrained(final / "huggingface")
    before = AutoModelForCausalLM.from_pretrained(downloaded)
    tokens = torch.arange(2, 34)[None]
    with torch.no_grad():
        expected = gpt(tokens)
        assert (hub(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (before(tokens).logits - expected).abs().max() > 1e-5 * expected.abs().max()
        adapted = PeftModel.from_pretrained(before, final / "peft")
        assert (adapted(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.sweep
def test_answers(downloaded: Path, tmp_path: Path) -> None:
    more = ["--prompt", "def ", "--max_new_tokens", "4", "--seed", "1"]
    command = [*python(), str(RECIPES / "generate.py"), str(downloaded), *more]
    assert "4 tokens, " in finish([start(command, tmp_path / "output")])
