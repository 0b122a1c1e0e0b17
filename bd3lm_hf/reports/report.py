"""`bd3lm report`: write a page and pictures of the results of runs and evaluations.

bd3lm report RUN... [--output report.html]

RUN is the folder of a training run, finished or not; a folder that holds runs or results; or a result file: of eval,
quality or compare (.json), or samples (.jsonl). The page needs no other file; its figures are also written as PNG.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bd3lm_hf.output_files import begins_with, check_output_file, write_atomically
from bd3lm_hf.reports.plotting import Figure, as_png, check_matplotlib, speed_quality_figure
from bd3lm_hf.reports.report_html import page
from bd3lm_hf.reports.run_reader import Material, read_material
from bd3lm_hf.reports.training_figures import curves, intervals, variances


def write_report(paths: Sequence[Path], output: Path, *, overwrite: bool = False) -> list[Path]:
    """Read, draw, and write the page and its pictures, `<name of the page>-<figure>.png`.

    Equal files give equal bytes: nothing in the page comes from a clock.

    Returns:
        The files, the page first.

    Raises:
        ValueError: if the output cannot be written, matplotlib is missing, or a file cannot be read (see
            `read_material`).
    """
    is_ours = begins_with(b'<meta name="generator" content="bd3lm_hf')
    check_output_file(output, "--output", is_ours=is_ours, overwrite=overwrite)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: a report is a page, so its name ends in .html.")
    check_matplotlib()
    text, figures = _render_named(paths)
    write_atomically(output, text)
    written = [output]
    for figure in (figure for group in figures.values() for figure in group):
        written.append(output.with_name(f"{output.stem}-{figure.name}.png"))
        write_atomically(written[-1], as_png(figure))
    return written


def _render(paths: Sequence[Path]) -> tuple[str, dict[str, list[Figure]]]:
    material = read_material(paths)
    figures = draw(material)
    return page(material, figures), figures


def _render_named(paths: Sequence[Path]) -> tuple[str, dict[str, list[Figure]]]:
    """Render the page, and name the file whose fields are missing or of another type if that fails."""
    try:
        return _render(paths)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, ValueError) and any(str(path) in str(error) for path in paths):
            raise
        # Fields are only used while drawing, long after their file was read: try one at a time.
        for path in paths:
            try:
                _render([path])
            except Exception as reason:
                raise ValueError(
                    f"{path}: its results are damaged or not ours, with a field that is missing or of another type "
                    f"({type(reason).__name__}: {reason})."
                ) from error
        raise


def draw(material: Material) -> dict[str, list[Figure]]:
    """Return every figure that there are numbers for, by section of the page."""
    noise = [intervals(material.runs), *(variances(run, n) for n, run in enumerate(material.runs, start=1))]
    samplers = [speed_quality_figure(named, number) for number, named in enumerate(material.qualities, start=1)]
    return {
        "curves": curves(material.runs),
        "noise": [figure for figure in noise if figure is not None],
        "quality": [figure for figure in samplers if figure is not None],
    }


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm report`.

    Raises:
        ValueError: if an argument or a file is wrong.
    """
    written = write_report(arguments.runs, arguments.output, overwrite=arguments.overwrite)
    count = len(written) - 1
    print(f"{written[0]}, and {count} figure{'' if count == 1 else 's'} as {written[0].stem}-*.png")
