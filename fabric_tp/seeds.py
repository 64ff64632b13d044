"""Seeds made from words: equal in every process, unlike Python's own hashes."""

from __future__ import annotations

import hashlib


def mix(*words: object) -> int:
    """A seed below 2**63 that depends on all words, their types and their order."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
