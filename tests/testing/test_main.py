"""``python -m fabric_tp.testing``."""

from __future__ import annotations

import re
from functools import partial

import pytest

from fabric_tp.testing import __main__, parity


def test_equal_models_exit_with_0(forked_ranks, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        __main__.main("litgpt", every=90)
    assert exit.value.code == 0
    *lines, totals = capsys.readouterr().out.splitlines()
    assert totals == "3 equal, 0 refused, 0 not built, 0 ERROR, 0 DIFFERENT"
    assert len(lines) == 3
    assert all(re.fullmatch(r"\S+ +equal +\d\.\de[-+]\d\d \S.*", line) for line in lines)


@pytest.mark.swept(lambda p: p["only"] == "lfm2_moe")
@pytest.mark.parametrize(
    ("models", "only", "printed"),
    [
        ("litgpt", "SmolLM2-135M-I", r"SmolLM2-135M-Instruct +equal +\d\.\de-\d\d "),  # nine heads on two ranks
        ("lora", "pythia, nothing of that name", ""),
        ("lora", "Gemma-2b, query and value", r"Gemma-2b, query and value +equal +\d\.\de-\d\d "),
        ("huggingface", "lfm2_moe", r"lfm2_moe +equal +mixers whole, \d\.\de-\d\d "),
        ("huggingface", "jetmoe", r"jetmoe +refused +The architecture of this JetMoeForCausalLM is not known"),
    ],
)
def test_lines(forked_ranks, capsys, models, only, printed) -> None:
    with pytest.raises(SystemExit) as exit:
        __main__.main(models, only=only)
    assert exit.value.code == 0
    assert re.match(printed, capsys.readouterr().out)


def test_a_mismatch_exits_with_1(forked_ranks, monkeypatch, capsys) -> None:
    monkeypatch.setattr(__main__, "Report", partial(parity.Report, tolerance=0.0))
    with pytest.raises(SystemExit) as exit:
        __main__.main("litgpt", only="pythia-14m")
    assert exit.value.code == 1
    assert re.search(r"pythia-14m +DIFFERENT +\d\.\de-\d\d ", capsys.readouterr().out)
