"""The flags of `bd3lm report` and `bd3lm bench`; modules of this folder do the work. Imports nothing slow."""

import argparse
from pathlib import Path

from bd3lm_hf.argument_parser import ArgumentParser


def report_parser() -> argparse.ArgumentParser:
    """Return the parser of `bd3lm report`."""
    parser = ArgumentParser(
        prog="bd3lm report",
        description="Write a page of the curves, tables and samples of runs and of result files.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run, or a result file")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that this command did not write")
    return parser


def bench_parser() -> argparse.ArgumentParser:
    """Return the parser of `bd3lm bench`."""
    parser = ArgumentParser(
        prog="bd3lm bench",
        description="Compare with transformers' models, several noise draws with one, or estimators of likelihood.",
        allow_abbrev=False,
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 1024], help="training lengths, batch 2")
    parser.add_argument("--new-tokens", type=int, nargs="*", default=[64, 1024], help="lengths to write, batch 1")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="*", default=[8], help="texts at once, of the first of these lengths"
    )
    parser.add_argument("--decoder", metavar="TYPE", help="compare block diffusion on this decoder with the stock one")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each pair; about half at length 1,024")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--noise-draws", type=int, nargs="+", help="measure the gradient's variance at these numbers")
    parser.add_argument(
        "--estimators", nargs="+", help="measure standard errors for their time, such as: published stratified:4 exact"
    )
    of_both = "with --noise-draws or --estimators"
    parser.add_argument("--model", help=f"{of_both}: a trained checkpoint")
    parser.add_argument("--dataset", default="python-docs", help=f"{of_both}: name, file, folder or hub name")
    parser.add_argument("--batch-size", type=int, default=8, help=f"{of_both}: sequences at once")
    parser.add_argument("--batches", type=int, default=16, help=f"{of_both}: different batches")
    return parser
