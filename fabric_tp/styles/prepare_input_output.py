from __future__ import annotations

from typing import Any

from fabric_tp.autograd.collectives import Layout
from fabric_tp.styles.layout import join, leave_sharded, leaving
from fabric_tp.styles.prepare_input import PrepareInput
from fabric_tp.styles.style import Parallelized


class PrepareInputOutput(PrepareInput):
    """A module that makes partial sums of its output in several places: the input as above, the output summed once.

    Args:
        input_layout: As in :class:`PrepareInput`.
        output_layout: As in :class:`Rowwise`.
        regather: As in :class:`Colwise`.

    ===============  ===============  ===========  =========  ===========  ==============  =======================
    input_layout     output_layout    x            inside     y            forward         backward
    ===============  ===============  ===========  =========  ===========  ==============  =======================
    ``"replicate"``  ``"replicate"``  (b, s, h)    (b, s, h)  (b, s, h)    all-reduce      all-reduce
    ``"sequence"``   ``"sequence"``   (b, s/t, h)  (b, s, h)  (b, s/t, h)  all-gather,     all-gather, all-gather,
                                                                           reduce-scatter  reduce-scatter
    ===============  ===============  ===========  =========  ===========  ==============  =======================

    Raises:
        ValueError: For ``"sequence"``, the number of ranks does not divide the sequence length.

    Example::

        plan = {
            "moe": PrepareInputOutput(),
            "moe.experts.*.up": Colwise(None),
            "moe.experts.*.down": Rowwise(None),
        }
    """

    def __init__(
        self,
        input_layout: Layout | None = "replicate",
        output_layout: Layout | None = "replicate",
        *,
        regather: bool = True,
    ) -> None:
        super().__init__(input_layout, regather=regather)
        self.output_layout = output_layout

    def leave(self, this: Parallelized, y: Any) -> Any:
        return leave_sharded(this, y, self.output_layout)

    def collectives(self) -> tuple[str, str]:
        return join(super().collectives(), leaving(self.output_layout))
