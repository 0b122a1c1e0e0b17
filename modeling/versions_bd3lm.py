"""The versions of transformers that can run this code; under any other it says so in one line, when it is imported."""

import re

import transformers


_FIRST, _END = (5, 12), (6,)
TRANSFORMERS_VERSIONS = f">={'.'.join(map(str, _FIRST))},<{'.'.join(map(str, _END))}"


def check_transformers(found: str) -> None:
    """Refuse a version of transformers that this code was not written for.

    Args:
        found: such as "5.23.0"; a development version counts as the one that it becomes.

    Raises:
        ImportError: names the versions found and needed.
    """
    number = re.match(r"\d+(\.\d+)*", found)
    release = tuple(map(int, number[0].split("."))) if number else ()
    if not _FIRST <= release < _END:
        raise ImportError(
            f"the code of this model needs transformers {TRANSFORMERS_VERSIONS}, but {found} is installed here: run "
            f'`pip install "transformers{TRANSFORMERS_VERSIONS}"`.'
        )


check_transformers(transformers.__version__)

__all__ = ["TRANSFORMERS_VERSIONS", "check_transformers"]
