"""Derive seeds from other seeds: for an example, an epoch, a sequence to score."""

import hashlib


def derived_seed(*parts: int | str) -> int:
    """Derive a seed from the seed of a run and names or numbers of its use.

    Neighbouring seeds of a Mersenne Twister give correlated first numbers; hashed seeds do not.
    """
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
