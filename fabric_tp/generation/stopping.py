"""Where a continuation ends."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stopping:
    sequences: list[list[int]]
    """Of tokens; any of them ends a continuation."""
    include: bool
    """Whether it is part of the continuation."""

    def held(self, tokens: list[int]) -> int:
        """How many of the last tokens may turn out to be the beginning of a sequence that is not included."""
        beginnings = [
            length
            for sequence in self.sequences
            for length in range(1, len(sequence))
            if tokens[-length:] == sequence[:length]
        ]
        return 0 if self.include else max(beginnings, default=0)

    def ending(self, tokens: list[int]) -> list[int] | None:
        """The longest sequence that the tokens end with; None if there is none."""
        ends = [sequence for sequence in self.sequences if tokens[-len(sequence) :] == sequence]
        return max(ends, key=len, default=None)


@dataclass
class Continuation:
    """The new tokens of one prompt."""

    stopping: Stopping
    tokens: list[int] = field(default_factory=list)
    given_out: int = 0
    stopped: bool = False

    def add(self, token: int, *, last: bool) -> list[int]:
        """Take a token; ``last`` if no other will come. Returns what is new and certain."""
        self.tokens.append(token)
        ending = self.stopping.ending(self.tokens)
        self.stopped = ending is not None or last
        withheld = 0 if last else self.stopping.held(self.tokens)
        if ending is not None:
            withheld = 0 if self.stopping.include else len(ending)
        certain = self.tokens[self.given_out : len(self.tokens) - withheld]
        self.given_out = max(self.given_out, len(self.tokens) - withheld)
        return certain
