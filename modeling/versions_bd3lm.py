"""Check that the installed version of transformers can run this code, when a saved folder is first imported."""

import re

import transformers


_FIRST, _END = (5, 12), (6,)
TRANSFORMERS_VERSIONS = f">={'.'.join(map(str, _FIRST))},<{'.'.join(map(str, _END))}"


def check_transformers(installed: str) -> None:
    """Refuse a version of transformers that this code was not written for.

    Args:
        installed: such as "5.23.0". A development version counts as the release that it becomes.

    Raises:
        ImportError: if the version is outside `TRANSFORMERS_VERSIONS`.
    """
    number = re.match(r"\d+(\.\d+)*", installed)
    release = tuple(map(int, number[0].split("."))) if number else ()
    if not _FIRST <= release < _END:
        raise ImportError(
            f"the code of this model needs transformers {TRANSFORMERS_VERSIONS}, but {installed} is installed here: "
            f'run `pip install "transformers{TRANSFORMERS_VERSIONS}"`.'
        )


check_transformers(transformers.__version__)
