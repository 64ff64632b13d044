import pytest
from arguments import Args
from optimization import learning_rate


def test_learning_rate() -> None:
    args = Args(lr=1.0, min_lr=0.1, warmup_steps=4, max_steps=12)
    rates = [learning_rate(args, step) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)
