"""The flags of `bd3lm convert`, `push` and `verify`; convert.py and push.py do the work. Imports nothing slow."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path


#: Larger weights are split into files of this size.
MAX_SHARD_SIZE = "5GB"

#: Which weights of a checkpoint to take, if it has an average.
WEIGHTS = ("auto", "ema", "raw")

_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)


def add_convert_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm convert`."""
    parser.description = "Convert a published or Lightning checkpoint into a folder that loads by itself, and back."
    parser.add_argument("source", metavar="SRC", help="folder, Hub name or .ckpt file")
    parser.add_argument("target", metavar="DST", help="folder to write")
    layouts = ("bd3lm_hf", "published", "sdar", "stock")
    parser.add_argument("--to", default="bd3lm_hf", choices=layouts, help="layout to write")
    parser.add_argument("--weights", default="auto", choices=WEIGHTS, help="weights to take from a .ckpt file")
    parser.add_argument("--tokenizer", help="folder or name, if the source has none")
    parser.add_argument("--model-type", help="bd3lm, ar, mdlm or sedd, if the source does not determine it")
    parser.add_argument("--block-size", type=int, help="block size of a decoder, if its files do not set it")
    parser.add_argument("--mask-token-id", type=int, help="mask token of a decoder, if its files do not set it")


def add_push_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm push`."""
    parser.description = "Upload a model so that anyone can load it. The token comes from HF_TOKEN or `hf auth login`."
    parser.add_argument("source", metavar="DIR", help="folder of a run, a checkpoint, a converted model or an adapter")
    parser.add_argument("repo", metavar="REPO", help="owner/name on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to write to, created if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", help="commit message")
    parser.add_argument("--dry-run", type=Path, metavar="OUT", help="write the files to this folder, upload nothing")
    parser.add_argument("--max-shard-size", type=_shard_size, default=MAX_SHARD_SIZE, help="split larger weights")
    parser.add_argument("--weights", default="auto", choices=WEIGHTS, help="weights to take if there is an average")
    parser.add_argument("--base-model", help="repository of an adapter's base model")
    parser.add_argument("--license", help="license of the model, in the Hub's spelling, such as apache-2.0")
    parser.add_argument("--token", type=_no_token, help=argparse.SUPPRESS)
    parser.add_argument("--no-tokenizer", action="store_true", help="the model has no tokenizer")


def add_verify_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm verify`."""
    parser.description = "Verify that the files of a shared model are those that were pushed."
    parser.add_argument("folder", metavar="DIR", help="folder, or name of a repository on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--strict", action="store_true", help="also exit with code 1 for code of another version")


def _shard_size(text: str) -> str:
    if not _SIZE.fullmatch(text.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 5GB or 500MB")
    return text.strip()


def _no_token(text: str) -> str:
    raise argparse.ArgumentTypeError("a token does not belong on the command line: set HF_TOKEN, or `hf auth login`")
