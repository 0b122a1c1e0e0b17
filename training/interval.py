"""The data-driven clipped schedule: the interval of noise levels whose losses vary least (arXiv 2503.09573, Sec. 5.2).

For each candidate, the unbiased variance of the losses of all blocks of a batch is summed over batches; the first
candidate with the smallest sum wins. The losses are those of training, with the published weight w(t) and without the
paper's factor for the width of the interval (see `denoising_loss`): that factor would favour narrow intervals.
"""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers.utils import logging

from bd3lm_hf.checkpoints import NotFiniteError
from bd3lm_hf.evaluation.perplexity import batch_of
from bd3lm_hf.modeling.configuration_bd3lm import SAMPLING_EPS
from bd3lm_hf.modeling.noise_bd3lm import check_interval
from bd3lm_hf.reports.figures import draw_searches
from bd3lm_hf.run_folder import SEARCH_NAME
from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.training.loss_moments import BlockMoments, HeldOut, Interval, PassPerInterval, SharedDraws, held_out
from bd3lm_hf.user_files import write_atomically


logger = logging.get_logger("bd3lm_hf.interval")

PLOT_NAME = "interval_search.png"

PUBLISHED_WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
PUBLISHED_STEP = 0.05
_SMALLEST_STEP = 0.001  # a thousand intervals of each width
WHOLE: Interval = (SAMPLING_EPS, 1)  # the first candidate of every search

METHODS: dict[str, type[SharedDraws] | type[PassPerInterval]] = {"shared": SharedDraws, "published": PassPerInterval}

_INTERVAL = re.compile(r"\s*(\d*\.?\d+(?:[eE]-?\d+)?)\s*-\s*(\d*\.?\d+(?:[eE]-?\d+)?)\s*")


# Candidates


def published_intervals(widths: Sequence[float], step: float = PUBLISHED_STEP) -> list[Interval]:
    """Return the published candidates: [1e-3, 1], then for each width the intervals that start at multiples of `step`.

    End points are those of the published float32 arithmetic, raised to 1e-3. With a width that is not a multiple of
    `step` the last interval of that width reaches beyond 1, as published.
    """
    minimum = torch.tensor(SAMPLING_EPS)
    found = [WHOLE]
    for width in widths:
        starts = torch.arange(0, 1 - width + step, step)
        found += zip(starts.maximum(minimum).tolist(), (starts + width).maximum(minimum).tolist(), strict=True)
    return found


def candidate_intervals(
    block_size: int,
    *,
    widths: Sequence[float] | None = None,
    step: float = PUBLISHED_STEP,
    own: Sequence[Interval] = (),
) -> list[Interval]:
    """Return the intervals to compare: the whole one, then those of each width inside [0, 1], then `own` ones.

    At block size 1, as published, the only other candidate is [1, 1], at which the loss is the exact likelihood.

    Args:
        widths: widths to search; by default the published ones, unless `own` intervals are given.
        step: distance between lower ends.
        own: further intervals; end points are rounded to float32, as the model stores them, and raised to 1e-3.

    Raises:
        ValueError: if a width is outside (0, 1], the step below 0.001, or an interval reversed or not inside [0, 1].
    """
    if widths is None:
        widths = () if own else PUBLISHED_WIDTHS
    for width in widths:
        if not 0 < width <= 1:
            raise ValueError(f"interval_search_widths {width}: give widths above 0 and up to 1.")
    if not step >= _SMALLEST_STEP:
        raise ValueError(f"interval_search_step {step}: give a step of at least {_SMALLEST_STEP}.")
    for low, high in own:
        if not 0 <= low <= high <= 1 or high == 0:
            raise ValueError(
                f"interval_candidates {low}-{high}: write the lower end first, both ends inside [0, 1], as in 0.3-0.8."
            )
    if block_size == 1:
        found = [WHOLE] if own else [WHOLE, (1, 1)]
    else:
        found = [interval for interval in published_intervals(widths, step) if interval[1] <= 1]
    # The model stores its interval in float32 buffers: compare intervals that it can store.
    rounded = torch.tensor(list(own)).reshape(-1, 2).maximum(torch.tensor(SAMPLING_EPS)).tolist()
    return list(dict.fromkeys(found + [(low, high) for low, high in rounded]))


def parse_interval(text: str) -> Interval:
    """Parse an interval: `"0.3-0.8"` is (0.3, 0.8).

    Raises:
        ValueError: if the text is not two numbers.
    """
    match = _INTERVAL.fullmatch(text)
    if match is None:
        raise ValueError(f"interval_candidates {text!r}: write two numbers, as in 0.3-0.8.")
    return float(match[1]), float(match[2])


def check_searchable(model: Any, candidates: Sequence[Interval]) -> None:
    """Refuse a search whose winner could not be stored in the model or used in training.

    Raises:
        ValueError: if the model carries no interval, or does not save it, or a candidate contains no mask rate of a
            block.
    """
    if not model.carries_interval:
        raise ValueError(
            f"interval_search needs a model that carries its interval of noise levels, and this "
            f"{type(model).__name__} has none: use a block-diffusion model with var_min=True, or leave out the search."
        )
    if model.config.masking == "exact_k":
        raise ValueError(
            "interval_search compares losses under independent masks, and this model has masking='exact_k': train "
            "with --masking independent, or leave --interval_search out."
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "interval_search would find an interval that a checkpoint of adapters does not store: set one on the base "
            "model (set_interval), or leave out the search."
        )
    constant = [f"{low:g}-{high:g}" for low, high in candidates if 0.5 < low < high]
    if constant:
        logger.warning(
            f"interval_candidates {', '.join(constant)} start above 0.5, where the published loss has the weight 1 "
            f"instead of 1/t: their variance is lower for that reason alone. Start them at 0.5 or below."
        )
    for low, high in candidates:
        check_interval(low, high, model.config.block_size, truncated=model.config.resample)


# The statistic


def first_smallest(variances: torch.Tensor) -> int:
    """Return the index of the smallest of `(candidates,)`, the first one of equals.

    Raises:
        NotFiniteError: if a variance is NaN or infinite.
    """
    values = variances.tolist()
    if not all(map(math.isfinite, values)):
        raise NotFiniteError(
            f"the loss variances of {sum(not math.isfinite(value) for value in values)} of {len(values)} intervals "
            f"are NaN or infinite: this model cannot choose an interval. Start from an earlier checkpoint."
        )
    return values.index(min(values))


def sum_moments(moments: BlockMoments) -> torch.Tensor:
    """Return number, zeroth, first, squared first and second moment, summed over blocks, `(5, candidates)`."""
    zeroth, first, second = moments
    return torch.stack([torch.ones_like(first), zeroth, first, first.square(), second]).double().sum(-1)


def variance_of_sums(sums: torch.Tensor) -> torch.Tensor:
    """Return the expected unbiased variance of the losses of N blocks, `(...)`, from sums of moments `(5, ...)`.

    For blocks with independent losses it is mean(E[X^2]) - sum_{i != j} E[X_i] E[X_j] / (N (N - 1)). With a single
    draw of each loss this is the unbiased variance of the draws itself. NaN for fewer than two blocks.
    """
    n, zeroth, first, first_squared, second = sums
    pairs = first.square() - first_squared
    variance = second / n - pairs / (n * (n - 1))
    # Control variate: an interval that got too many of the draws has proportionally too large moments.
    return variance + (first / n).square() * (zeroth / n - 1)


# The search


class IntervalSearch(NamedTuple):
    """The result of a search."""

    candidates: list[Interval]  # the whole interval first
    batch_variances: torch.Tensor  # float64 (candidates, batches), of the mean loss of a block, nats^2
    num_blocks: int
    noisy_passes: int  # over each batch, in addition to one pass of the clean stream
    seconds: float

    @property
    def variances(self) -> torch.Tensor:
        """Return the mean over batches for each candidate, `(candidates,)`, the value that the authors log."""
        return self.batch_variances.mean(1)

    @property
    def standard_errors(self) -> torch.Tensor:
        """Return standard errors of `variances`, from the spread over batches; NaN for a single batch."""
        spread, batches = self.batch_variances, self.batch_variances.shape[1]
        return spread.std(1) / math.sqrt(batches) if batches > 1 else torch.full_like(spread[:, 0], math.nan)

    @property
    def best(self) -> int:
        """Return the index of the winner."""
        return first_smallest(self.batch_variances.sum(1))

    @property
    def interval(self) -> Interval:
        """Return the winner."""
        return self.candidates[self.best]


def search_intervals(
    model: Any,
    sequences: Sequence[Any],
    *,
    candidates: Sequence[Interval] | None = None,
    method: str = "shared",
    batch_size: int = 16,
    max_batches: int = 100,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
) -> IntervalSearch:
    """Measure the variance of the training loss under every candidate interval; the model is not changed.

    The result depends on the model, the sequences, `batch_size` and `seed`, not on the number of processes: batch b
    has the sequences from `b * batch_size` on, and every sequence has its own generator.

    ```python
    >>> found = search_intervals(model, held_out_rows)
    >>> model.set_interval(*found.interval)
    ```

    Args:
        model: a [`BD3LMForMaskedLM`].
        sequences: as in [`bd3lm_hf.evaluation.perplexity.perplexity`].
        candidates: intervals to compare, see [`candidate_intervals`]; the published ones by default.
        method: `"shared"` (at most 12 noisy passes over a batch) or `"published"` (one for each candidate).
        batch_size: sequences of a batch, over all processes.
        max_batches: batches to use.
        share: index of this process, and number of processes that share the work. Every process gets the result.

    Raises:
        ValueError: if the method is unknown, a count is below 1, or no batch has two blocks to score.
    """
    started = time.perf_counter()
    for name, value in (("batch_size", batch_size), ("max_batches", max_batches)):
        if value < 1:
            raise ValueError(f"{name}={value}: give a whole number of at least 1.")
    candidates = candidate_intervals(model.config.block_size) if candidates is None else list(candidates)
    if method not in METHODS:
        raise ValueError(f"interval_search_method {method!r}: choose one of {', '.join(METHODS)}.")
    if method == "shared" and model.config.time_conditioning:
        logger.warning_once(
            f"interval search: the model reads the noise level (time_conditioning=True), so draws cannot be shared: "
            f"each batch takes {len(candidates)} noisy passes, one for each interval, each with its own clean pass."
        )
        method = "published"
    measure = METHODS[method](model.config, candidates)
    batches = [
        range(start, min(start + batch_size, len(sequences))) for start in range(0, len(sequences), batch_size)
    ][:max_batches]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            sums = [_measure_batch(measure, model, sequences, batch, seed, share) for batch in batches]
    finally:
        model.train(was_training)
    if not sums:
        raise ValueError("an interval search needs held-out sequences: there are 0.")
    # Sums of moments add up over processes; variances would not.
    total = torch.stack(sums, dim=1)  # (5, batches, candidates)
    if share[1] > 1:
        total = torch.stack(gather_object([total])).sum(0)
    # A variance needs two blocks: batches with fewer are left out.
    total = total[:, total[0, :, 0] >= 2]
    if not total.shape[1]:
        raise ValueError(
            "an interval search needs batches of at least two blocks with something to score: give longer or more "
            "held-out sequences, or a larger batch."
        )
    return IntervalSearch(
        candidates=list(candidates),
        batch_variances=variance_of_sums(total).T.contiguous(),
        num_blocks=int(total[0, :, 0].sum()),
        noisy_passes=measure.passes,
        seconds=time.perf_counter() - started,
    )


def _measure_batch(
    measure: Callable[[Any, HeldOut], BlockMoments],
    model: Any,
    sequences: Sequence[Any],
    batch: range,
    seed: int,
    share: tuple[int, int],
) -> torch.Tensor:
    """Measure the part of a batch that belongs to this process."""
    process, processes = share
    own = list(batch[process::processes])
    # Sharded weights need the same forward passes on every process: one with a row fewer repeats the first row.
    rows = own if len(own) == -(-len(batch) // processes) else [*own, batch[0]]
    device = next(model.parameters()).device
    input_ids, attention_mask, context = batch_of([sequences[row] for row in rows], device)
    # On the CPU, so that a seed chooses the same interval on every device.
    generators = [torch.Generator().manual_seed(derived_seed(seed, row)) for row in rows]
    text = held_out(model, input_ids, attention_mask, context.get("labels"), generators)
    if len(own) < len(rows):
        text.scored.counted[-1], text.scored.maskable[-1] = False, False
    return sum_moments(measure(model, text))


# The record


def interval_metrics(found: IntervalSearch) -> dict[str, float]:
    """Return the logged numbers of a search. Variances are those of a block's mean loss, in nats squared."""
    low, high = found.interval
    variances = found.variances.tolist()
    return {
        "interval_min": float(low),
        "interval_max": float(high),
        "interval_variance": variances[found.best],
        "interval_variance_full": variances[0],
        "interval_search_runtime": found.seconds,
    }


def record_search(found: IntervalSearch, folder: str | Path, *, step: int, adopted: bool) -> None:
    """Append the search to `interval_search.jsonl` and draw `interval_search.png`.

    Lines of this step or a later one, which a run wrote before it was resumed, are replaced. Without matplotlib there
    is one warning and no plot. The plot shows the variance and its standard error against the lower end, one line per
    width.

    Args:
        adopted: whether the model uses the winner from now on.
    """
    path = Path(folder) / SEARCH_NAME
    # A resumed run repeats the searches after its checkpoint.
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [line for line in earlier if json.loads(line)["step"] < step]
    errors = [error if math.isfinite(error) else None for error in found.standard_errors.tolist()]
    rows = zip(found.candidates, found.variances.tolist(), errors, strict=True)
    search = {
        "step": step,
        "adopted": adopted,
        "interval": found.interval,
        "batches": found.batch_variances.shape[1],
        "blocks": found.num_blocks,
        "noisy_passes_per_batch": found.noisy_passes,
        "seconds": round(found.seconds, 3),
        "candidates": [
            {"interval": interval, "variance": variance, "standard_error": error} for interval, variance, error in rows
        ],
    }
    write_atomically(path, "".join(f"{line}\n" for line in [*lines, json.dumps(search)]))
    try:
        draw_searches([search]).savefig(path.with_name(PLOT_NAME), dpi=144)
    except ImportError:
        logger.warning_once(f"no {PLOT_NAME}: matplotlib is not installed. The numbers are in {path}.")
