"""The argument parser of every verb, with one-line errors without secrets and control characters.

Imports nothing that is slow: `bd3lm VERB --help` must answer before torch is loaded.
"""

import argparse
import re
from typing import NoReturn


# Tokens that are recognised by their prefix: the Hub's, and those of services that people keep in the same shell.
_TOKEN = re.compile(r"\b(hf_|api_org_|sk-|gh[pousr]_|github_pat_|xox[abp]-)[\w-]{3,}")
# The value of an option or header that carries a secret, whatever the value looks like.
_SECRET = re.compile(
    r"((?:--?[\w-]*(?:token|api[-_]?key|password|secret)|authorization:)(?:=|\s+)(?:bearer\s+)?|\bbearer\s+)([^\s'\"]+)",
    re.IGNORECASE,
)


class ArgumentParser(argparse.ArgumentParser):
    """Report a wrong argument in one line, without secrets, and exit with code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n")


def mask_secrets(text: str) -> str:
    """Return a text with tokens and the values of secret options replaced by `***`."""
    from huggingface_hub import get_token  # only where something is printed: it costs a third of a second

    own = get_token()
    if own:
        text = text.replace(own, "***")
    return _TOKEN.sub(r"\1***", _SECRET.sub(r"\1***", text))


def printable(text: str) -> str:
    """Return a text whose control characters are escaped, so that a name from a file cannot steer the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_line(text: str) -> str:
    """Return a text as one printable line without secrets, for error messages."""
    return printable(" ".join(mask_secrets(text).split()))


def with_underscores(word: str) -> str:
    """Return a word whose flag is spelled with underscores: `--max-steps=3` as `--max_steps=3`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name.removeprefix("--").replace("-", "_") + equals + value


__all__ = ["ArgumentParser", "mask_secrets", "one_line", "printable", "with_underscores"]
