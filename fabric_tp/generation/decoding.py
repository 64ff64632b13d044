"""A parallelized model while it generates: what differs from when it trains, and is put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fabric_tp.parallelize.partial_gradients import gathered_by_fsdp
from fabric_tp.styles.style import Held, LocalModule, put_back


def tensor_parallel_size(model: nn.Module) -> int:
    sizes = (module.parallelized.group.size for module in model.modules() if isinstance(module, LocalModule))
    return next(sizes, 1)


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """Within it each rank computes with the whole sequence, which may be one token, and nothing is dropped.

    Parallelized modules also hold plain local parameters all the time, rather than take them in each forward, unless
    FSDP2 gathers these.
    """
    parallel = [module for module in model.modules() if isinstance(module, LocalModule)]
    styles = [module.parallelized.style for module in parallel]
    training = [module for module in model.modules() if module.training]
    gathered = gathered_by_fsdp(model)
    held: Held = []
    try:
        model.eval()
        for module in parallel:
            module.parallelized.style = module.parallelized.decoding or module.parallelized.style
        for module in parallel if not gathered else ():
            held += module.take_local()
        yield
    finally:
        put_back(held)
        for module, style in zip(parallel, styles, strict=True):
            module.parallelized.style = style
        for each in training:
            each.training = True
        for group in gathered:
            group.reshard()  # parameters may change before the next forward, which would use what was gathered here
