"""Seeds that follow from other seeds: of an example, of an epoch, of a sequence that is scored."""

import hashlib


def derived_seed(*parts: int | str) -> int:
    """Return the seed that belongs to a run's seed and whatever names one use of it.

    Neighbouring seeds of a Mersenne twister give correlated first numbers; those of a hash do not.
    """
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
