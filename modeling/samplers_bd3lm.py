"""The order in which the masked positions of a block are revealed, one class per published rule, and token sampling.

For each denoising step a sampler yields the positions to predict. First-hitting and ancestral sampling choose them
before any prediction, so they plan the whole block at once, and the network's head runs at these positions only. The
parallel samplers predict all masked positions and accept some. The state of a sampler lives on the CPU: a step waits
for the device only to learn which predictions were accepted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .logits_process_bd3lm import NucleusLogitsProcessor
from .noise_bd3lm import LogLinearNoise, noise_schedule, wide_float


# Values of `sampling_dtype` in the generation config -> precision of the probabilities.
SAMPLING_DTYPES = {"float32": torch.float32, "float64": torch.float64}

Generators = torch.Generator | list[torch.Generator] | None  # one for the batch, or one per row

LAST_TIME = 1e-5  # where the published grid of the analytic sampler ends, before the rest is revealed

_FAR = 1e4  # nats subtracted from tokens outside the nucleus, so they are drawn only if all others are forbidden


def random_uniform(shape: Sequence[int], device: torch.device, generator: Generators = None) -> torch.Tensor:
    """Return uniform numbers on [0, 1) on `device`, in float64 where the device has it.

    They are drawn on the generator's device, by default the CPU, so that a seed gives the same numbers on every
    device. With one generator per row of `shape`, each row gets the numbers that it would get alone.
    """
    if isinstance(generator, list):
        return torch.stack([random_uniform(shape[1:], device, row_generator) for row_generator in generator])
    home = torch.device("cpu") if generator is None else generator.device
    uniform = torch.rand(tuple(shape), generator=generator, device=home, dtype=wide_float(home))
    return uniform.to(device, wide_float(device), non_blocking=device.type != "cpu")


def check_generators(generator: Generators, batch: int) -> None:
    """Refuse a list of generators that does not have one per row of the batch."""
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} rows: pass one per row, or a single one.")


def sample_categorical(
    scores: torch.Tensor,
    uniform: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    in_groups: bool | None = None,
) -> torch.Tensor:
    """Draw one token per row of unnormalised log-probabilities `(rows, vocab_size)` by inverting the CDF.

    This needs one uniform number per row instead of one per token of the vocabulary, and on a CPU a tenth of the time
    of `torch.multinomial` or Gumbel-max sampling. It also avoids their weakness in float32, where the smallest number
    that can be drawn truncates the tail and so sharpens the distribution (Zheng et al., arXiv 2409.02908).

    Args:
        uniform: `(rows,)` on [0, 1).
        dtype: precision of the probabilities, which are summed in float64 where the device has it. A token of
            probability zero is never drawn.
        in_groups: sum groups of the vocabulary in parallel and draw a group first. The default except on a CPU: an
            accelerator sums a row in one thread block, which would take longer than everything else here.
    """
    probability = scores.to(dtype).softmax(dim=-1)
    target = uniform.to(wide_float(scores.device)).unsqueeze(1)
    if not (scores.device.type != "cpu" if in_groups is None else in_groups):
        return _invert_cdf(_cumulative(probability), target).squeeze(1)
    size = math.isqrt(probability.shape[1] - 1) + 1
    groups = F.pad(probability, (0, size * size - probability.shape[1])).unflatten(1, (size, size))
    totals = groups.sum(dim=-1, dtype=target.dtype)
    cumulative = _cumulative(totals)
    group = _invert_cdf(cumulative, target)
    total = totals.gather(1, group)
    # The position of the number within its group is again uniform.
    target = ((target * cumulative[:, -1:] - cumulative.gather(1, group)) / total + 1).clamp(0, 1)
    token = _invert_cdf(_cumulative(groups.take_along_dim(group.unsqueeze(2), dim=1).squeeze(1)), target)
    return (group * size + token).squeeze(1)


def _cumulative(weights: torch.Tensor) -> torch.Tensor:
    """Return the cumulative sums of weights `(rows, n)`, in float64 where the device has it."""
    wide = wide_float(weights.device)
    cumulative = weights.cumsum(dim=-1, dtype=wide)
    if wide == torch.float64 and weights.device.type == "cpu":
        return cumulative
    # A parallel sum can change by a rounding error where nothing is added, which would give a token of probability
    # zero a step in the CDF.
    return cumulative.masked_fill(weights == 0, 0).cummax(dim=-1).values


def _invert_cdf(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the index `(rows, 1)` of the step of the CDF that contains `target` `(rows, 1)` on [0, 1]."""
    # Below the total even after rounding; from the right, so that the step found has a positive height.
    target = target * cumulative[:, -1:] * (1 - 4 * torch.finfo(cumulative.dtype).eps)
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)


def token_probability(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the probability `(rows,)` of one token per row under unnormalised log-probabilities."""
    return (scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - scores.logsumexp(dim=-1)).exp()


@dataclass
class RevealState:
    """The positions of a block to reveal, for all rows of a batch; tensors on the CPU."""

    masked: torch.Tensor  # bool (batch, block_size), still to be revealed; updated by the writer
    requested: torch.Tensor  # bool (batch, block_size): a row is done when these are revealed
    do_sample: bool = True  # without it, positions are revealed from left to right, so that a text is reproducible
    left_to_right: bool = False  # even when sampling, for processors that read the text
    generator: Generators = None
    mask_prob: float = 1.0  # probability of being masked before the first step

    def candidates(self) -> torch.Tensor:
        """Return which positions can be predicted, bool `(batch, block_size)`.

        These include positions after the requested ones, whose tokens influence the others. From left to right they
        are excluded: they would come last and influence nothing.
        """
        return self.masked & self.requested if self.left_to_right else self.masked

    def unfinished(self) -> torch.Tensor:
        """Return which rows have requested positions left, bool `(batch, 1)`."""
        return (self.masked & self.requested).any(1, keepdim=True)

    def live_positions(self) -> torch.Tensor:
        """Return the candidates of unfinished rows, as flat indices into `(batch, block_size)`."""
        return (self.candidates() & self.unfinished()).flatten().nonzero().squeeze(1)

    def hitting_keys(self) -> torch.Tensor:
        """Return numbers on [0, 1), `(batch, block_size)`: positions with larger numbers are revealed first.

        They are independent and uniform, or evenly spaced from left to right without `do_sample`.
        """
        # Rank of each masked position in its row, from the left.
        rank = self.masked.cumsum(1) - 1
        if not self.do_sample:
            return 1 - (rank.double() + 0.5) / self.masked.sum(1, keepdim=True).clamp(min=1)
        keys = random_uniform(self.masked.shape, self.masked.device, self.generator)
        if self.left_to_right:
            # The same random numbers, sorted: positions are revealed from left to right, at random times.
            keys = torch.where(self.masked, keys, -1.0).sort(dim=1, descending=True).values
            keys = keys.gather(1, rank.clamp(min=0))
        return keys


class Step(NamedTuple):
    """One forward pass of the network; tensors on the CPU."""

    positions: torch.Tensor  # flat indices into (batch, block_size), in reading order: these are predicted
    mask_prob: torch.Tensor  # (batch,), probability of being masked; time-conditioned models read it
    min_accepted: torch.Tensor | None = None  # (batch,), how many predictions must be accepted; None: one per row


class Sampler:
    """A rule for the order in which positions are revealed.

    Args:
        generation_config: has the fields of the rule.
        config: the configuration of the model.
    """

    is_parallel = False  # whether `accept` chooses among the predictions

    def __init__(self, generation_config: Any, config: Any) -> None:
        self.fields, self.config = generation_config, config
        self.num_steps: int | None = generation_config.num_denoising_steps
        self.noise, self.time_conditioning = noise_schedule(config.noise), bool(config.time_conditioning)

    def steps(self, state: RevealState) -> Iterator[Step]:
        """Yield the steps of a block, each after the previous one has been taken."""
        raise NotImplementedError

    def select(self, state: RevealState, step: Step, logits: torch.Tensor) -> tuple[Step, torch.Tensor]:
        """Return the positions of a step at which to draw tokens, and their logits; by default all of them.

        Args:
            logits: `(positions, vocab_size)`, raw.
        """
        return step, logits

    def accept(self, state: RevealState, step: Step, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return which predictions of a step are revealed, bool `(positions,)`, for a parallel sampler.

        Args:
            tokens: `(positions,)`, drawn from `scores` `(positions, vocab_size)`, both on the model's device.
        """
        raise NotImplementedError


class HittingSampler(Sampler):
    """A sampler that decides when each position is revealed before it sees any probability."""

    def hits(self, state: RevealState) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the step that reveals each masked position, and the masking probability at that step.

        Both are `(batch, block_size)`. Step numbers may have gaps; only their order within a row matters.
        """
        raise NotImplementedError

    def steps(self, state: RevealState) -> Iterator[Step]:
        """Yield the steps of all rows side by side. A row skips the steps in which it reveals nothing."""
        hit_step, mask_prob = self.hits(state)
        # Number the remaining steps of each row without gaps.
        number = _dense_rank(hit_step.masked_fill(~state.masked, torch.iinfo(hit_step.dtype).max))
        # A row is done after the step that reveals its last requested position.
        last = number.masked_fill(~(state.masked & state.requested), -1).amax(1, keepdim=True)
        due = state.candidates() & (number <= last)
        positions = due.flatten().nonzero().squeeze(1)
        if not positions.numel():
            return
        step_of_position = number.flatten()[positions]
        ordered = positions[step_of_position.argsort(stable=True)]
        for count, current in enumerate(ordered.split(step_of_position.bincount().tolist())):
            yield Step(current, mask_prob.masked_fill(~due | (number != count), 0.0).amax(1).float())


class FirstHittingSampler(HittingSampler):
    """Reveal one uniformly chosen masked position per row and step (Zheng et al., arXiv 2409.02908; BD3-LM's default).

    This simulates the reverse process exactly: masked tokens are hit one at a time, each remaining one equally likely
    to be next. With `num_denoising_steps` below the number of masked tokens, the steps share them evenly.
    """

    def hits(self, state: RevealState) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.where(state.masked, state.hitting_keys(), -1.0)
        # argsort twice gives the rank of each key.
        rank = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count = state.masked.sum(1, keepdim=True)
        mask_prob = torch.full(rank.shape, state.mask_prob, dtype=torch.float64)
        if self.time_conditioning:
            uniform = random_uniform(rank.shape, rank.device, state.generator) if state.do_sample else None
            mask_prob = state.mask_prob * hitting_times(count, rank.shape[1], uniform).gather(1, rank)
        if self.num_steps is None:
            return rank, mask_prob
        return rank * self.num_steps // count.clamp(min=1), mask_prob


def hitting_times(count: torch.Tensor, length: int, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """Return when `count` masked tokens `(batch, 1)` are hit, from t = 1: t <- t * u^(1 / n) with n still masked.

    Time is the probability that a token is masked. Measured this way, a masked token is hit at a uniform time under
    every noise schedule, so the hitting times are those of the log-linear one.

    Args:
        uniform: random numbers `(batch, length)`; without them each time is its expectation, t * n / (n + 1).

    Returns:
        `(batch, length)`.
    """
    remaining = (count - torch.arange(length)).clamp(min=1).double()
    factors = remaining / (remaining + 1) if uniform is None else uniform.double() ** (1 / remaining)
    return factors.cumprod(dim=1)


class AncestralSampler(HittingSampler):
    """Take `num_denoising_steps` steps from t = 1 to 0; by default as many as a block has tokens.

    From t to s = t - 1 / steps a masked token stays masked with probability move_chance(s) / move_chance(t) (Sahoo et
    al., arXiv 2406.07524, Eq. 6), in the last step never. The products of these factors give the distribution of the
    step that reveals a position, so that step is drawn up front. Steps that reveal nothing cost no forward pass.
    """

    def hits(self, state: RevealState) -> tuple[torch.Tensor, torch.Tensor]:
        keys = state.hitting_keys()
        steps = self.num_steps or keys.shape[1]
        mask_prob = self.noise.move_chance(torch.linspace(1, 0, steps + 1, dtype=keys.dtype))
        still_masked = mask_prob[1:-1] / mask_prob[0]
        # The first step after which a position is masked with a probability of at most its key.
        hit_step = torch.searchsorted(-still_masked, -keys.contiguous())
        return hit_step, state.mask_prob * mask_prob[hit_step]


class ParallelSampler(Sampler):
    """Predict all masked positions and accept the most certain ones, at least one in each row.

    With `num_denoising_steps`, accept at least as many per step as are needed to finish in time.
    """

    is_parallel = True

    def steps(self, state: RevealState) -> Iterator[Step]:
        number = 0
        while (positions := state.live_positions()).numel():
            minimum = None
            if self.num_steps is not None:
                # Rounded up, so that the last step accepts everything that is left.
                minimum = -(-(state.masked & state.unfinished()).sum(1) // (self.num_steps - number))
            yield Step(positions, state.masked.float().mean(1), minimum)
            number += 1

    def uncertainty(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return how uncertain each prediction is, `(positions,)`. Less uncertain ones are accepted first."""
        raise NotImplementedError

    def is_within_bound(self, uncertainty: torch.Tensor) -> torch.Tensor:
        """Return which predictions can be accepted if all before them are.

        Args:
            uncertainty: `(batch, block_size)` in the order of acceptance; infinity where a position has no prediction.
        """
        raise NotImplementedError

    def accept(self, state: RevealState, step: Step, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uncertainty = self.uncertainty(tokens, scores)
        positions = step.positions.to(uncertainty.device, non_blocking=True)
        grid = uncertainty.new_full(state.masked.shape, torch.inf)
        grid.view(-1)[positions] = uncertainty
        # The most certain predictions first, or those from the left.
        order = (grid.isinf().byte() if state.left_to_right else grid).argsort(dim=1, stable=True)
        # cumprod: the first prediction outside the bound ends the run of accepted ones.
        accepted = self.is_within_bound(grid.gather(1, order)).cumprod(dim=1).bool()
        if step.min_accepted is None:
            accepted[:, 0] = True
        else:
            minimum = step.min_accepted.to(grid.device, non_blocking=True).unsqueeze(1)
            accepted |= torch.arange(grid.shape[1], device=grid.device) < minimum
        return torch.empty_like(accepted).scatter_(1, order, accepted).view(-1)[positions]


class ConfidenceSampler(ParallelSampler):
    """Reveal the tokens that are more probable than `confidence_threshold` (Wu et al., arXiv 2505.22618).

    Probabilities are those of the processed scores, from which the token was drawn.
    """

    def uncertainty(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return -token_probability(scores, tokens)

    def is_within_bound(self, uncertainty: torch.Tensor) -> torch.Tensor:
        return uncertainty < -self.fields.confidence_threshold


class EntropyBoundSampler(ParallelSampler):
    """Reveal positions of low entropy while they are nearly independent (Ben-Hamu et al., arXiv 2505.24857).

    The mutual information of k tokens is at most the sum of their entropies without the largest one. Positions are
    revealed while that sum is within `entropy_bound`, in nats. Entropies are those of the processed scores.
    """

    def uncertainty(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(scores.softmax(dim=-1)).sum(dim=-1)

    def is_within_bound(self, uncertainty: torch.Tensor) -> torch.Tensor:
        return uncertainty.cumsum(dim=1) - uncertainty.cummax(dim=1).values <= self.fields.entropy_bound


class AnalyticSampler(Sampler):
    """The analytic sampler of score entropy (Lou et al., arXiv 2310.16834, Alg. 2), the only sampler for scores.

    Take `num_denoising_steps` steps of equal size from t = 1 to 1e-5, by default as many as the window has tokens,
    then a last one that reveals the rest. With S the sum of the scores at a masked position, a step from sigma_t to
    sigma_s reveals it with probability (e^(sigma_t - sigma_s) - 1) S, at most 1. Its token is drawn in proportion to
    the scores. One random number per position decides: the position is revealed when its probability of still being
    masked, the product over the steps, falls to that number.

    As published, `nucleus_p` applies to scores and mask together, normalised: it slows the first steps, in which the
    mask is nearly certain. Other processors see only the logits of the tokens. They affect which token a position
    gets, but not when. If they read the text, positions wait for those to their left.
    """

    def steps(self, state: RevealState) -> Iterator[Step]:
        self._key = state.hitting_keys()
        self._masked_prob = torch.ones_like(self._key)  # probability that each position is still masked
        count = self.num_steps or self._key.shape[1]
        times = state.mask_prob * torch.linspace(1, LAST_TIME, count + 1, dtype=self._key.dtype)
        levels = LogLinearNoise().sigma(times).tolist()
        rises = [math.expm1(now - then) for now, then in zip(levels, levels[1:], strict=False)]
        for number, time in enumerate(times.float()):
            positions = state.live_positions()
            if not positions.numel():
                return
            # The last step, from 1e-5 to 0, leaves no mask.
            self._sigma, self._rise = levels[number], rises[number] if number < count else math.inf
            yield Step(positions, time.expand(state.masked.shape[0]))

    def select(self, state: RevealState, step: Step, logits: torch.Tensor) -> tuple[Step, torch.Tensor]:
        scores, reveal_prob = self._apply_nucleus(logits)
        # A position is revealed when the probability that it is still masked falls to its random number.
        self._masked_prob.view(-1)[step.positions] *= 1 - reveal_prob.cpu()
        revealed = self._masked_prob <= self._key
        if state.left_to_right:  # only up to the first position that is not revealed
            revealed &= (revealed | ~state.candidates()).cumprod(dim=1).bool()
        kept = revealed.view(-1)[step.positions].nonzero().squeeze(1)
        return step._replace(positions=step.positions[kept]), scores[kept.to(scores.device, non_blocking=True)]

    def _apply_nucleus(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token logits confined to the nucleus, and the probability `(positions,)` that each is revealed."""
        scores, mask = logits.clone(), self.config.mask_token_id
        scores[:, mask] = -torch.inf
        # log-scores are logits - log(e^sigma - 1) - log(V - 1), see `modeling_sedd.py`.
        shift = math.log(math.expm1(self._sigma)) + math.log(logits.shape[1] - 1)
        certain = torch.zeros(len(scores), dtype=torch.bool, device=logits.device)
        odds = scores  # against the mask, whose score is 1
        if self.fields.nucleus_p < 1.0:
            ranked = scores - shift
            ranked[:, mask] = 0.0
            outside = NucleusLogitsProcessor(self.fields.nucleus_p)(None, ranked).isneginf()
            certain = outside[:, mask]
            odds = scores.masked_fill(outside, -torch.inf)
            scores = torch.where(outside, scores - _FAR, scores)
        if self._rise == math.inf:
            return scores, torch.ones_like(certain, dtype=wide_float(logits.device))
        reveal_prob = (odds.logsumexp(dim=1) - shift).to(wide_float(logits.device)).exp() * self._rise
        return scores, reveal_prob.masked_fill(certain, 1.0).clamp(max=1.0)


def _dense_rank(values: torch.Tensor) -> torch.Tensor:
    """Return for each entry the number of distinct smaller values in its row."""
    ordered, order = values.sort(dim=1)
    rank = torch.zeros_like(values)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    return torch.empty_like(rank).scatter(1, order, rank)


SAMPLERS: dict[str, type[Sampler]] = {
    "first_hitting": FirstHittingSampler,
    "ancestral": AncestralSampler,
    "confidence": ConfidenceSampler,
    "entropy_bound": EntropyBoundSampler,
}

# For networks that predict scores (ratios of probabilities) instead of tokens.
SCORE_SAMPLERS: dict[str, type[Sampler]] = {"analytic": AnalyticSampler}
