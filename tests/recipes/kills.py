"""Kills ranks of the recipe at random moments, again and again, and compares what is left with a run left alone.

``python -m tests.recipes.kills 200`` kills so many times, on meshes in turn, and prints what was killed when.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.programs import HERE, SECONDS, Program, run_ranks, start_ranks

from .runs import options, rows

MESHES = ((1, 2), (2, 1), (2, 2))
"""(data-parallel, tensor-parallel)"""

STEPS, SAVE_INTERVAL, KEEP_LAST = 16, 2, 2

DEADLINE = 15
"""Seconds from the kill until all processes are gone."""

SAME = ("step", "loss", "learning_rate", "gradient_norm", "val_loss")
"""Columns of metrics.csv that do not depend on the machine."""


@dataclass(frozen=True)
class Place:
    """Where in a run a rank may be killed."""

    count: int
    """The kill is at one of the first so many times that the rank comes there, counted from each start,"""
    delay: float
    """and up to so many seconds later."""
    any_rank: bool
    """Rank 0 alone does the rest."""


PLACES = {
    "training": Place(6, 0.15, True),
    "staging": Place(2, 0.03, True),
    "writing": Place(8, 0.01, True),
    "renaming": Place(9, 0.003, False),
    "logging": Place(8, 0.002, False),
    "final": Place(9, 0.003, False),
}


@dataclass(frozen=True)
class Moment:
    place: str
    count: int
    delay: float
    rank: int
    """The rank that has to come there."""
    killed: list[int]

    @classmethod
    def draw(cls, generator: random.Random, size: int) -> Moment:
        name = generator.choice(list(PLACES))
        place, rank = PLACES[name], generator.randrange(size)
        count = generator.randint(1, place.count if name != "writing" or rank == 0 else 4)
        delay = generator.choice([0.0, generator.uniform(0, place.delay)])
        killed = generator.choice([[rank], [generator.randrange(size)], list(range(size))])
        return cls(name, count, delay, rank if place.any_rank else 0, killed)

    def __str__(self) -> str:
        who = "all ranks" if len(self.killed) > 1 else f"rank {self.killed[0]}"
        return f"{who} {1000 * self.delay:.0f} ms after rank {self.rank} came to {self.place} for time {self.count}"


class Chain:
    """A run that is killed and resumed until it has come to its end."""

    def __init__(self, folder: Path, sizes: tuple[int, int], seed: int) -> None:
        self.sizes, self.size = sizes, sizes[0] * sizes[1]
        name = f"{sizes[0]}x{sizes[1]}"
        self.undisturbed, self.out_dir = folder / f"undisturbed-{name}", folder / f"killed-{name}-{seed}"
        self.generator = random.Random(seed)
        self.newest = self.lives = self.kills_before_first = 0
        if not self.undisturbed.exists():
            run_ranks(self.size, self._options(self.undisturbed))

    def kills(self, most: int) -> Iterator[Moment]:
        """What was killed, once it is gone and has been resumed from or is about to be. In the end all is compared."""
        for _ in range(most):
            moment = Moment.draw(self.generator, self.size)
            if not self._live(moment):
                break
            yield moment
        else:
            assert not self._live(None)
        self._compare()

    def _options(self, out_dir: Path, *more: object) -> list[str]:
        mesh = ("--data_parallel_size", self.sizes[0], "--tensor_parallel_size", self.sizes[1])
        often = ("--max_steps", STEPS, "--save_interval", SAVE_INTERVAL, "--eval_interval", 5, "--eval_steps", 1)
        return options(out_dir, *mesh, *often, "--sample_tokens", 0, "--keep_last", KEEP_LAST, *more)

    def _live(self, moment: Moment | None) -> bool:
        """Run until the moment, or the end, and check what is left; whether it was killed."""
        self.lives += 1
        log, pids = (self.out_dir.with_name(f"{self.out_dir.name}.{name}") for name in (f"log{self.lives}", "pids"))
        within = []
        if moment is not None:
            told = {**asdict(moment), "out_dir": str(self.out_dir), "pids": str(pids)}
            within = [str(HERE / "killed.py"), json.dumps(told)]
        given = self._options(self.out_dir, "--async_save", "true", "--resume", "auto")
        programs = start_ranks(self.size, given, log, within=within)
        pids.write_text(json.dumps([program.pid for program in programs]))
        try:
            killed = _ends(programs)
            self._check(killed)
        except AssertionError as error:
            raise AssertionError(f"{self.out_dir}, life {self.lives}: {moment}\n{error}\n{log.read_text()}") from error
        return killed

    def _check(self, killed: bool) -> None:
        names = {path.name for path in self.out_dir.glob("*")}
        steps = sorted(name for name in names if name.startswith("step-"))
        for each in steps:
            assert all((self.out_dir / each / name).is_file() for name in (".metadata", "meta.pt")), (
                f"{each}: not whole"
            )
        newest = int(steps[-1].removeprefix("step-")) if steps else 0
        assert newest >= self.newest, f"{newest} is the newest step, and was {self.newest}"
        self.newest = newest
        self.kills_before_first += newest == 0
        previous = {name for name in names if name.startswith("previous-")}
        assert len(previous) <= self.kills_before_first, sorted(names)
        others = names - previous - {*steps, "logs", "final"}
        assert len(steps) <= KEEP_LAST + killed, steps
        assert len(others) <= 2 * killed, others

    def _compare(self) -> None:
        mine, theirs = (
            [[row[name] for name in SAME] for row in rows(each)] for each in (self.out_dir, self.undisturbed)
        )
        assert len(theirs) == STEPS
        assert mine == theirs, f"{self.out_dir}\n{mine}\n{theirs}"
        mine, theirs = ((each / "final" / "lit_model.pth").read_bytes() for each in (self.out_dir, self.undisturbed))
        assert mine == theirs, f"{self.out_dir}: other final weights"
        assert {path.name for path in (self.out_dir / "logs").iterdir()} == {"metrics.csv"}


def _ends(programs: list[Program]) -> bool:
    """Wait until all have ended, and see that nothing is left of them; whether any was killed."""
    end = time.monotonic() + SECONDS
    while None in (codes := [program.poll() for program in programs]) and not any(codes) and time.monotonic() < end:
        time.sleep(0.02)
    ended = [program.wait(DEADLINE) for program in programs]
    left = [
        process.pid for process in psutil.process_iter() if _session(process.pid) in {each.pid for each in programs}
    ]
    assert not left, f"still there: {left}"
    assert all(code == 0 for code in ended) or -9 in ended, f"exit codes {ended}"
    return -9 in ended


def _session(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


def main(count: int, seed: int = 0) -> None:
    done: list[tuple[str, Moment]] = []
    start = time.monotonic()
    with TemporaryDirectory() as folder:
        chain = 0
        while len(done) < count:
            sizes = MESHES[chain % len(MESHES)]
            for moment in Chain(Path(folder), sizes, seed + chain).kills(min(8, count - len(done))):
                done.append((f"{sizes[0]}x{sizes[1]}", moment))
                print(f"{len(done)}: {done[-1][0]}, {moment}", flush=True)
            chain += 1
    print(f"{len(done)} kills in {chain} runs, {time.monotonic() - start:.0f} s: every run ended as if undisturbed")
    for title, counts in {
        "mesh": Counter(mesh for mesh, _ in done),
        "place": Counter(moment.place for _, moment in done),
        "killed": Counter("all" if len(moment.killed) > 1 else "one rank" for _, moment in done),
    }.items():
        print(f"{title}: " + ", ".join(f"{number} {name}" for name, number in sorted(counts.items())))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
