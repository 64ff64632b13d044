import pytest
from arguments import command_line
from model import model_config


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--model_name", "Llama-3-8b"], r"'Llama-3-8b' is not known. Did you mean Llama-3-8B or"),
        (["--model.n_layers", "2"], r"no 'n_layers'. Did you mean n_layer"),
        (["--model.n_head", "7"], r"does not fit tiny-llama-3"),
        (["--max_seq_length", "2048"], r"max_seq_length=2048 is above tiny-llama-3's 1024"),
        (["--initial_checkpoint_dir", "nowhere"], r"'nowhere' holds no checkpoint"),
        (["--dropout", "1"], r"--dropout 1.0 must lie in \[0, 1\)"),
        (
            ["--dropout", "0.1", "--model_name", "Gemma-2-2b", "--model.block_size", "256"],
            r"Gemma-2-2b has norms where",
        ),
    ],
)
def test_models_that_do_not_work(given: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model_config(command_line(given))
