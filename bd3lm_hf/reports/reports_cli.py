"""The flags of `bd3lm report`, `bench` and `quality`; other modules do the work. Imports nothing slow."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bd3lm_hf.console import add_model_arguments, integer
from bd3lm_hf.generation.generate_cli import FIELDS
from bd3lm_hf.user_files import check_output_file, is_json_with


#: The field that sets how fast a sampler goes, and its default values, one token per forward pass first.
CURVES: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "first_hitting": ("num_denoising_steps", (None, 2, 1)),
    "confidence": ("confidence_threshold", (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003, 0.0)),
    "entropy_bound": ("entropy_bound", (0.0, 1.0, 2.0, 4.0, 8.0)),
}

#: Fields that are the same for all settings.
SHARED_FIELDS = ("temperature", "nucleus_p")

#: File formats of plots.
PICTURES = (".png", ".svg", ".pdf")


def add_report_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm report`."""
    parser.description = "Write a page of curves, tables and samples from runs and result files."
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run, or a result file")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that this command did not write")


def add_bench_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm bench`."""
    parser.description = (
        "Measure speed and memory next to transformers' models, or the variance of gradients or likelihood estimates."
    )
    count = integer(1)
    parser.add_argument("--lengths", type=count, nargs="*", default=[256, 1024], help="training lengths, batch 2")
    parser.add_argument("--new-tokens", type=count, nargs="*", default=[64, 1024], help="tokens to generate, batch 1")
    parser.add_argument(
        "--batch-sizes", type=count, nargs="*", default=[8], help="larger batches, for the first of these lengths"
    )
    parser.add_argument("--decoder", metavar="TYPE", help="compare block diffusion on this decoder with the stock one")
    parser.add_argument(
        "--repeats", type=count, default=5, help="timed rounds per pair; half as many from length 1,024"
    )
    parser.add_argument("--threads", type=count, default=2, help="CPU threads")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--noise-draws", type=count, nargs="+", help="measure the gradient's variance for these numbers"
    )
    instead.add_argument(
        "--estimators", nargs="+", help="measure standard error and time, for example: published stratified:4 exact"
    )
    of_both = "with --noise-draws or --estimators"
    parser.add_argument("--model", help=f"{of_both}: a trained checkpoint")
    parser.set_defaults(tokenizer=None, device="cpu", trust_remote_code=False)
    parser.add_argument("--dataset", default="python-docs", help=f"{of_both}: name, file, folder or hub name")
    parser.add_argument("--batch-size", type=count, default=8, help=f"{of_both}: sequences per batch")
    parser.add_argument("--batches", type=count, default=16, help=f"{of_both}: number of batches")


def add_quality_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm quality`."""
    add_model_arguments(parser)
    parser.add_argument("--judge", help="folder or hub name of the reference model; by default the model itself")
    parser.add_argument("--num-samples", type=integer(2), default=64, help="texts per setting")
    parser.add_argument("--dataset", help="held-out text to take prompts from; by default there are none")
    parser.add_argument("--prompt-tokens", type=integer(1), default=32, help="tokens per prompt")
    parser.add_argument("--new-tokens", type=integer(1), help="tokens per text; by default the model's window")
    parser.add_argument("--batch-size", type=integer(1), default=16)
    parser.add_argument("--greedy", action="store_true", help="take the most likely tokens; needs --dataset")
    for name in SHARED_FIELDS:
        kind, text = FIELDS[name]
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=1.0, help=text)
    for sampler, (name, values) in CURVES.items():
        text = f"for {sampler}, the slowest first ({' '.join(str(v) for v in values if v is not None)})"
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=FIELDS[name][0], nargs="*", default=list(values), help=text
        )
    parser.add_argument("--plot", type=Path, help=f"plot of the curves ({', '.join(PICTURES)})")
    parser.add_argument("--output", type=Path, help="JSON file for the points, written after each setting")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this command did not write")


def check_quality(arguments: argparse.Namespace) -> None:
    """Check the arguments before a model is loaded."""
    if arguments.greedy and arguments.dataset is None:
        raise ValueError("--greedy without prompts generates the same text every time: take prompts from a --dataset.")
    if arguments.output is not None:
        is_ours = is_json_with("judge", "points")
        check_output_file(arguments.output, "--output", is_ours=is_ours, overwrite=arguments.overwrite)
    if arguments.plot is not None:
        if arguments.plot.suffix.lower() not in PICTURES:
            raise ValueError(f"--plot {arguments.plot}: the name of a plot must end in one of {', '.join(PICTURES)}.")
        check_output_file(arguments.plot, "--plot", is_ours=_is_our_picture, overwrite=arguments.overwrite)


def _is_our_picture(path: Path) -> bool:
    return b"bd3lm_hf" in path.read_bytes()  # the author; each format has its own field for it
