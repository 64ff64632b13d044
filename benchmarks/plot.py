"""Plots and Markdown tables of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fabric_tp.measure.memory import KINDS, Kind, Memory

COLORS: Mapping[Kind, str] = {
    "parameters": "#264653",
    "gradients": "#2a9d8f",
    "optimizer state": "#8ab17d",
    "buffers": "#6c757d",
    "activations": "#e9c46a",
    "logits and loss": "#f4a261",
    "collective buffers": "#e76f51",
    "temporaries": "#ced4da",
}


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; numbers to the right."""
    lines = [headings, ["--:"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot_feed_forward(memory: Mapping[int, Memory], published: Mapping[int, float], file: Path) -> None:
    """GB of a rank by kind against the number of ranks, beside what was published."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    sizes = list(memory)
    _stack(axes, [index - 0.2 for index in range(len(sizes))], list(memory.values()), 1e9, 0.36, "")
    axes.bar(
        [index + 0.2 for index in range(len(sizes))],
        [published.get(size, 0) for size in sizes],
        width=0.36,
        color="white",
        edgecolor="black",
        hatch="//",
        label="published in Lightning's guide",
    )
    _ideal(axes, sizes, memory[sizes[0]].peak / 1e9)
    _finish(axes, sizes, "GB on each rank", "SwiGLU 8192 x 8192, fp32, AdamW: a whole step")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_llama(
    name: str,
    found: Mapping[tuple[int, int], Mapping[str, Memory]],
    file: Path,
) -> None:
    """GiB of a rank by kind against tensor-parallel ranks: one panel for each number of data-parallel ranks.

    Args:
        name: Of the model.
        found: By data-parallel and tensor-parallel size, what each way needs; the first way is left, the second right.
        file: To write.
    """
    plt = _pyplot()
    datas = sorted({data for data, _ in found})
    figure, panels = plt.subplots(1, len(datas), figsize=(5.5 * len(datas), 4.2), layout="constrained", squeeze=False)
    for axes, data in zip(panels[0], datas, strict=True):
        sizes = sorted(size for other, size in found if other == data)
        ways = list(found[data, sizes[0]])
        for way, shift, hatch in zip(ways, (-0.2, 0.2), ("", "///"), strict=True):
            memories = [found[data, size][way] for size in sizes]
            _stack(axes, [index + shift for index in range(len(sizes))], memories, 2**30, 0.36, hatch)
        _ideal(axes, sizes, found[data, sizes[0]][ways[0]].peak / 2**30)
        title = f"{name}, data parallel {data}\nleft {ways[0]}, right (hatched) {ways[1]}"
        _finish(axes, sizes, "GiB on each rank at the peak of a step", title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_limited_link(
    seconds: Mapping[int | None, Mapping[str, float]], communication: Mapping[int, float], file: Path
) -> None:
    """Time of a step of each way against the bandwidth, and what the longer of computing and communicating takes.

    Args:
        seconds: By bandwidth in Mbit/s, None without a limit, and way.
        communication: Seconds that the bytes of a step take at each bandwidth.
        file: To write.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rates = sorted(communication)
    ways = list(seconds[None])
    for way in ways:
        axes.plot(rates, [1000 * seconds[rate][way] for rate in rates], marker="o", label=way)
    limit = [1000 * max(seconds[None][ways[0]], communication[rate]) for rate in rates]
    axes.plot(rates, limit, "k--", label="the longer of computing and communicating")
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates, [str(rate) for rate in rates])
    axes.set_xlabel("Mbit/s between two ranks")
    axes.set_ylabel("ms of forward and backward")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _stack(
    axes: Any, places: Sequence[float], memories: Sequence[Memory], unit: float, width: float, hatch: str
) -> None:
    bottom = [0.0] * len(memories)
    for kind in KINDS:
        heights = [memory.at_peak[kind] / unit for memory in memories]
        label = None if hatch else kind
        axes.bar(
            places,
            heights,
            bottom=bottom,
            width=width,
            color=COLORS[kind],
            hatch=hatch,
            label=label,
            edgecolor="white",
            linewidth=0.4,
        )
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def _ideal(axes: Any, sizes: Sequence[int], whole: float) -> None:
    axes.plot(
        range(len(sizes)), [whole * sizes[0] / size for size in sizes], "k--", marker="_", label="1/t of one rank"
    )


def _finish(axes: Any, sizes: Sequence[int], label: str, title: str) -> None:
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("tensor-parallel ranks")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("The plots need matplotlib: pip install -e '.[benchmarks]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
