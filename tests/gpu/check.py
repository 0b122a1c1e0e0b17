"""Check and measure everything on a GPU in nine minutes: `make gpu-check`.

python tests/gpu/check.py [--device cuda] [--tiny] [--output DIR] [--only PART ...]

Needs torch 2.11 and transformers 5.17 or newer, no installed copy of this package. Each part runs in a process of its
own with its own time limit, so a failure or a hang never hides the rest. What is not timed runs side by side, while
the timed parts compile their code; then these are timed one after the other. Results appear as soon as they are known
in `gpu-check.json`, `gpu-check.md` (tables for BENCHMARKS.md) and, with matplotlib, `gpu-check.png`.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parents[2]
for _path in (str(ROOT), str(Path(__file__).parent)):
    if _path not in sys.path:
        sys.path.insert(0, _path)

import measurements  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from measurements import Row, Settings  # noqa: E402


BUDGET = 540.0  # seconds of the whole check
LENGTHS = (1024, 2048, 4096)  # of the comparison with a dense mask


def run_tests(settings: Settings) -> Iterator[Row]:
    """Run the tests marked `gpu`."""
    if missing := measurements.has("pytest"):
        yield Row("tests marked gpu", None, goal="all pass", note=missing)
        return
    environment = {**os.environ, "BD3LM_TEST_DEVICE": settings.device}
    # Without the options of setup.cfg, which refuse a setting of a plugin that is not installed.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "--tb=short"]
    if not settings.tiny and not measurements.has("xdist"):
        command += ["-n", "4"]  # most of their time goes into compiling
    command.append(str(ROOT / "tests" / "gpu"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    (settings.output / "tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    lines = done.stdout.splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield Row(line[:200], None, met=False)
    yield Row("tests marked gpu", None, goal="all pass", met=done.returncode == 0, note=lines[-1] if lines else "")


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        work: yields its results.
        seconds: after which it is ended on a GPU.
        timed: whether it measures times. Such a part compiles while the others run, then waits until it is alone.
    """

    work: Callable[[Settings], Iterator[Row]]
    seconds: float
    timed: bool = True


# The most telling of each kind first, since the budget may end early.
PARTS = {
    "tests": Part(run_tests, 200, timed=False),
    "runs": Part(measurements.measure_runs, 330, timed=False),
    "launchers": Part(measurements.measure_launchers, 200, timed=False),
    "training": Part(measurements.measure_training, BUDGET),
    "generation": Part(measurements.measure_generation, BUDGET),
    "likelihood": Part(measurements.measure_likelihood, BUDGET),
    # One part per length, which compile side by side.
    **{f"attention-{n}": Part(functools.partial(measurements.measure_attention, length=n), BUDGET) for n in LENGTHS},
}


def run_part(name: str, settings: Settings) -> list[dict[str, Any]]:
    """Run one part in this process and append each row to `parts/NAME.jsonl` at once."""
    path = settings.output / "parts" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    rows = []
    with path.open("w", encoding="utf-8") as file:
        try:
            for row in PARTS[name].work(settings):
                rows.append({"part": name, **row._asdict()})
                print(json.dumps(rows[-1]), file=file, flush=True)
                print(f"{name}, {time.perf_counter() - started:.0f} s: {row.what}", flush=True)
        except Exception as error:  # whatever it is, the other parts go on
            failed = Row(f"{name} failed", None, met=False, note=f"{type(error).__name__}: {error}"[-1500:])
            rows.append({"part": name, **failed._asdict()})
            print(json.dumps(rows[-1]), file=file, flush=True)
            path.with_suffix(".txt").write_text(traceback.format_exc(), encoding="utf-8")
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return rows


class Process:
    """A part in a process group of its own, which is ended after a number of seconds."""

    def __init__(self, name: str, settings: Settings, seconds: float) -> None:
        self.name, self.seconds, self.until = name, seconds, time.monotonic() + seconds
        self.path = settings.output / "parts" / f"{name}.jsonl"
        self.path.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--part", name, "--device", settings.device]
        command += ["--output", str(settings.output), *(["--tiny"] if settings.tiny else [])]
        self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)

    def rows(self) -> list[dict[str, Any]]:
        """Wait for the end and return the rows that it wrote."""
        note = ""
        try:
            if code := self.process.wait(max(0.0, self.until - time.monotonic())):
                note = f"exit code {code}"
        except subprocess.TimeoutExpired:
            note = f"ended after its limit of {self.seconds:.0f} s"
        finally:
            self.end()
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        rows = [json.loads(line) for line in text.splitlines()]
        if note:
            failed = Row(f"{self.name} did not finish", None, met=False, note=note)
            rows.append({"part": self.name, **failed._asdict()})
        return rows

    def has_compiled(self) -> bool:
        """Whether it waits for its turn to be timed, or has ended."""
        waits = self.path.parents[1] / f"compiled-{self.process.pid}"
        return waits.exists() or self.process.poll() is not None

    def end(self) -> None:
        """End what is left of it, the processes that it started included."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_parts(names: Sequence[str], settings: Settings, budget: float) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each part: first of what is not timed, then, when all others have compiled, of these."""
    ready, started = settings.output / "ready", time.monotonic()
    for left in (ready, *settings.output.glob("compiled-*")):  # by an earlier check
        left.unlink(missing_ok=True)
    processes = [Process(name, settings, min(PARTS[name].seconds, budget)) for name in names]
    timed = [process for process in processes if PARTS[process.name].timed]
    try:
        for process in processes:
            if process not in timed:
                yield process.rows()
        # A part that has not compiled when the time gets short must not keep the others from their results.
        while not all(process.has_compiled() for process in timed) and time.monotonic() - started < 0.8 * budget:
            time.sleep(0.1)
        ready.touch()
        for process in timed:
            yield process.rows()
    finally:
        for process in processes:
            process.end()


def run_here(names: Sequence[str], settings: Settings) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each part from this process: on a CPU, starting seven would take most of the time."""
    with ThreadPoolExecutor() as pool:
        # What is not timed starts processes of its own, and waits for them.
        others = [pool.submit(run_part, name, settings) for name in names if not PARTS[name].timed]
        yield from (run_part(name, settings) for name in names if PARTS[name].timed)
        yield from (other.result() for other in others)


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row that says whether the gain over a dense mask grows with the length, if all lengths are measured."""
    gains = [row["ratio"] for row in rows if row["part"].startswith("attention-") and row["ratio"] is not None]
    if len(gains) < len(LENGTHS):
        return []
    row = Row("gain over a dense mask, longest", gains[-1], unit="x", goal="grows", met=gains == sorted(gains))
    return [{"part": f"attention-{LENGTHS[-1]}", **row._asdict()}]


def describe(settings: Settings) -> dict[str, Any]:
    """Return what the figures were measured on."""
    cuda = settings.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "tiny": settings.tiny,
    }


def write_results(settings: Settings, rows: Sequence[dict[str, Any]]) -> None:
    """Write what is known so far, whole."""
    about = describe(settings)
    files = {"gpu-check.json": json.dumps({"about": about, "rows": list(rows)}, indent=2)}
    files["gpu-check.md"] = markdown(about, rows)
    for name, text in files.items():
        part = settings.output / f"{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(settings.output / name)


def markdown(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return the tables, one for each part."""
    lines = [f"Measured on: {about['device']}, torch {about['torch']}, transformers {about['transformers']}."]
    for part in dict.fromkeys(row["part"] for row in rows):
        lines += ["", f"### {part}", "", "| what | ours | rival | ratio | goal | met | note |", "|" + "---|" * 7]
        for row in rows:
            if row["part"] == part:
                rival = f"{_number(row['rival'], row['unit'])} ({row['rival_name']})" if row["rival_name"] else ""
                met = {True: "yes", False: "NO", None: ""}[row["met"]]
                note = " ".join(row["note"].split()).replace("|", "\\|")[-300:]
                cells = (row["what"], _number(row["ours"], row["unit"]), rival, _number(row["ratio"], ""), row["goal"])
                lines.append(f"| {' | '.join((*cells, met, note))} |")
    return "\n".join(lines)


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g} {unit}".strip()


def plot(settings: Settings, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the ratios to the rivals as bars and the losses of the runs as curves, where matplotlib is installed."""
    if measurements.has("matplotlib"):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = [row for row in rows if row["ratio"] is not None]
    curves = sorted(settings.output.glob("run-*/training_curve.json"))
    figure, (bars, losses) = pyplot.subplots(
        2, figsize=(9, 5 + 0.3 * len(ratios)), height_ratios=(1 + 0.3 * len(ratios), 4), layout="constrained"
    )
    bars.barh([row["what"] for row in ratios], [row["ratio"] for row in ratios])
    bars.axvline(1.0, color="black", linewidth=0.8)
    bars.invert_yaxis()
    bars.set_xlabel("ratio to the rival")
    bars.set_title(str(describe(settings)["device"]))
    for path in curves:
        for name, curve in json.loads(path.read_text(encoding="utf-8")).items():
            if name in ("loss", "eval_loss"):
                losses.plot(curve["steps"], curve["values"], label=f"{path.parent.name}, {name}")
    losses.set_xlabel("step")
    losses.set_ylabel("nats per token")
    if losses.lines:
        losses.legend()
    figure.savefig(settings.output / "gpu-check.png", dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and return 0 if all of them ran and every goal was met, else 1."""
    parser = argparse.ArgumentParser(prog="check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --tiny")
    parser.add_argument(
        "--tiny", action="store_true", help="the same code at a size for a CPU; its times mean nothing"
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="run these parts only")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of the whole check")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; --device cpu --tiny checks the script itself")
    if not arguments.device.startswith("cuda") and not arguments.tiny:
        parser.error(f"--device {arguments.device}: only --tiny is meant for it")
    settings = Settings(arguments.device, arguments.tiny, arguments.output.resolve(), not arguments.part)
    settings.output.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        run_part(arguments.part, settings)
        return 0
    names = [name for name in PARTS if name in (arguments.only or PARTS)]
    rows: list[dict[str, Any]] = []
    for part in run_here(names, settings) if arguments.tiny else run_parts(names, settings, arguments.budget):
        rows += part
        write_results(settings, rows)
    rows += growth(rows)
    write_results(settings, rows)
    plot(settings, rows)
    print(settings.output / "gpu-check.md")
    return int(any(row["met"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
