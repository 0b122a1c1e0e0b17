"""How a token is drawn: the distribution function, inverted, and the published categorical draw beside it.

Which masked positions of a block are revealed in which step: one small class per published rule.

A sampler yields the places that a step predicts. First hitting and the ancestral sampler know them before any
probability is seen, so the whole block is planned at once and the network's head runs at these places only; the
parallel samplers predict all masked places and accept some. What a sampler counts lies on the host: the only thing
that a step waits for is which predictions were accepted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .logits_process_bd3lm import NucleusLogitsProcessor, wide_float
from .noise_bd3lm import LogLinearNoise, noise_schedule


# Precision of the probabilities that tokens are drawn from, by the name that a generation config gives it.
SAMPLING_DTYPES = {"float32": torch.float32, "float64": torch.float64}


Generators = torch.Generator | list[torch.Generator] | None  # a source of randomness, or one per row


def random_uniform(shape: Sequence[int], device: torch.device, generator: Generators = None) -> torch.Tensor:
    """Uniform numbers on [0, 1), as wide as possible, drawn where the generator lives and needed on `device`.

    With a generator for each row of `shape`, a row gets the numbers that it would get alone.
    """
    if isinstance(generator, list):
        return torch.stack([random_uniform(shape[1:], device, source) for source in generator])
    home = device if generator is None else generator.device
    drawn = torch.rand(tuple(shape), generator=generator, device=home, dtype=wide_float(home))
    return drawn.to(device, wide_float(device), non_blocking=device.type != "cpu")


def check_generators(generator: Generators, batch: int) -> None:
    """Refuse a list of generators that does not have one for each row.

    Raises:
        ValueError: tells both numbers.
    """
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} rows: give one for each row, or a single one.")


def sample_categorical(
    scores: torch.Tensor, uniform: torch.Tensor, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """One token per row of unnormalised log-probabilities `(rows, vocab_size)`: the distribution function, inverted.

    One uniform number a row instead of one for each token of the vocabulary, which on a CPU is an order of magnitude
    faster than `torch.multinomial` or a Gumbel race. It also lacks their weakness in float32: the smallest number that
    a race can draw bounds its tail, which sharpens the distribution (Zheng et al., arXiv 2409.02908).

    Args:
        uniform: `(rows,)` on [0, 1).
        dtype: of the probabilities; they are summed up in float64 where the device has it. A token of probability
            zero is never drawn.
    """
    probability = scores.to(dtype).softmax(dim=-1)
    wide = wide_float(scores.device)
    cumulative = probability.cumsum(dim=-1, dtype=wide)
    if wide != torch.float64:
        # Sums in parallel may fall or rise by a rounding error where nothing is added: such steps have no height here.
        cumulative = cumulative.masked_fill(probability == 0, 0).cummax(dim=-1).values
    # Below the total even after rounding; from the right, so that the step found has a positive height.
    below = uniform.to(wide).unsqueeze(1) * cumulative[:, -1:] * (1 - 4 * torch.finfo(wide).eps)
    return torch.searchsorted(cumulative, below, right=True).squeeze(1)


def draw_published(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The published categorical draw: the index `(...)` of the largest weight / (1e-10 - log(u + 1e-10)).

    An exponential race with one uniform number per entry, both `(..., vocab_size)`; `draw_tokens` draws from the same
    distribution with one number in all.
    """
    return (weights / (1e-10 - (uniform + 1e-10).log())).argmax(dim=-1)


def token_probability(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The probability `(rows,)` of one token per row under unnormalised log-probabilities `(rows, vocab_size)`."""
    return (scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - scores.logsumexp(dim=-1)).exp()


LAST_TIME = 1e-5  # where the published grid of the analytic sampler ends, before what is left is revealed


_FAR = 1e4  # nats by which a token outside the nucleus is less likely: never drawn, unless all others are forbidden


@dataclass
class RevealState:
    """The places of one block that are to be revealed, for all rows of a batch; tensors on the host."""

    masked: torch.Tensor  # bool (batch, block_size), still to be revealed; kept up to date by the writer
    wanted: torch.Tensor  # bool (batch, block_size): a row is done when these are revealed
    random: bool = True  # without chance places come from left to right, so that a text repeats itself
    in_order: bool = False  # reveal from left to right only, as processors that read the text need it
    generator: Generators = None
    start: float = 1.0  # probability of being masked at the beginning of the round

    def asked_for(self) -> torch.Tensor:
        """What may be predicted, bool `(batch, block_size)`: places that nobody wants, too, as they decide others.

        From left to right they can not, as they stand behind the wanted ones.
        """
        return self.masked & self.wanted if self.in_order else self.masked

    def hitting_keys(self) -> torch.Tensor:
        """Numbers on [0, 1), `(batch, block_size)`: of any two places the one with the larger number is hit first.

        Independent and uniform, or, without chance, evenly spaced from left to right.
        """
        rank = self.masked.cumsum(1) - 1
        if not self.random:
            return 1 - (rank.double() + 0.5) / self.masked.sum(1, keepdim=True).clamp(min=1)
        keys = random_uniform(self.masked.shape, self.masked.device, self.generator)
        if self.in_order:
            keys = torch.where(self.masked, keys, -1.0).sort(dim=1, descending=True).values
            keys = keys.gather(1, rank.clamp(min=0))
        return keys


class Step(NamedTuple):
    """One pass of the network."""

    places: torch.Tensor  # on the host, flat indices into (batch, block_size), in reading order: these are predicted
    chance: torch.Tensor  # (batch,), probability of being masked that a time-conditioned model is told
    least: torch.Tensor | None = None  # (batch,), how many predictions must be accepted; None: all are


class Sampler:
    """A rule for the order of revealing.

    Args:
        generation_config: read for the fields that the rule names.
        config: of the model.
    """

    weighs = False  # whether `accept` chooses among the predictions

    def __init__(self, generation_config: Any, config: Any) -> None:
        self.num_steps: int | None = generation_config.num_denoising_steps
        self.noise, self.timed = noise_schedule(config.noise), bool(config.time_conditioning)

    def steps(self, work: RevealState) -> Iterator[Step]:
        """The steps of a round, each yielded when the one before has been taken."""
        raise NotImplementedError

    def narrow(self, work: RevealState, step: Step, logits: torch.Tensor) -> tuple[Step, torch.Tensor]:
        """The places of a step for which tokens are drawn, with their logits; by default all of them.

        Args:
            logits: `(places, vocab_size)`, what the network says.
        """
        return step, logits

    def accept(self, work: RevealState, step: Step, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Which predictions of a step are revealed, where the rule weighs them.

        Args:
            tokens: `(places,)`, drawn from `scores` `(places, vocab_size)`, both on the model's device.

        Returns:
            bool `(places,)`.
        """
        raise NotImplementedError


class HittingSampler(Sampler):
    """A sampler that knows when each place is revealed before it sees any probability."""

    def hits(self, work: RevealState) -> tuple[torch.Tensor, torch.Tensor]:
        """For each masked place the number of the step that reveals it, and the masking probability at that step.

        Both `(batch, block_size)`; step numbers may have gaps, and only their order within a row matters.
        """
        raise NotImplementedError

    def steps(self, work: RevealState) -> Iterator[Step]:
        """Each row takes its own steps one after the other; a step in which nothing of a row is hit is left out."""
        when, chance = self.hits(work)
        number = _dense_rank(when.masked_fill(~work.masked, torch.iinfo(when.dtype).max))
        last = number.masked_fill(~(work.masked & work.wanted), -1).amax(1, keepdim=True)
        due = work.asked_for() & (number <= last)
        places = due.flatten().nonzero().squeeze(1)
        if not places.numel():
            return
        of_place = number.flatten()[places]
        in_turn = places[of_place.argsort(stable=True)]
        for count, now in enumerate(in_turn.split(of_place.bincount().tolist())):
            yield Step(now, chance.masked_fill(~due | (number != count), 0.0).amax(1).float())


class FirstHittingSampler(HittingSampler):
    """One uniformly chosen masked place per row and step (Zheng et al., arXiv 2409.02908; BD3-LM's default).

    Simulates the reverse process exactly: masked tokens are hit one at a time, each remaining one equally likely to
    be next. With `num_denoising_steps` below the number of masked tokens, the steps share them evenly.
    """

    def hits(self, work: RevealState) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.where(work.masked, work.hitting_keys(), -1.0)
        rank = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count = work.masked.sum(1, keepdim=True)
        chance = torch.full(rank.shape, work.start, dtype=torch.float64)
        if self.timed:
            uniform = random_uniform(rank.shape, rank.device, work.generator) if work.random else None
            chance = work.start * hitting_times(count, rank.shape[1], uniform).gather(1, rank)
        if self.num_steps is None:
            return rank, chance
        return rank * count.clamp(max=self.num_steps) // count.clamp(min=1), chance


def hitting_times(count: torch.Tensor, length: int, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """Times of the hits of `count` masked tokens `(batch, 1)`, from t = 1: t <- t * u^(1 / n) with n still masked.

    Time is the probability that a token is masked. Measured in it, a masked token is hit at a uniform time under every
    noise schedule, so the hitting times are those of the log-linear one.

    Args:
        uniform: the draws `(batch, length)`; without them each time has its expectation, t * n / (n + 1).

    Returns:
        `(batch, length)`.
    """
    remaining = (count - torch.arange(length)).clamp(min=1).double()
    factors = remaining / (remaining + 1) if uniform is None else uniform.double() ** (1 / remaining)
    return factors.cumprod(dim=1)


class AncestralSampler(HittingSampler):
    """`num_denoising_steps` steps from t = 1 to 0; by default as many as a block has tokens.

    From t to s = t - 1 / steps a masked token stays masked with probability move_chance(s) / move_chance(t) (Sahoo et
    al., arXiv 2406.07524, Eq. 6), in the last step never. The products of these factors are the distribution of the
    step that reveals a place, which is therefore drawn first: steps that reveal nothing cost no pass of the network.
    """

    def hits(self, work: RevealState) -> tuple[torch.Tensor, torch.Tensor]:
        keys = work.hitting_keys()
        steps = self.num_steps or keys.shape[1]
        chance = self.noise.move_chance(torch.linspace(1, 0, steps + 1, dtype=keys.dtype))
        masked_after = chance[1:-1] / chance[0]
        # The first step after which a place is masked with a probability of at most its key.
        when = torch.searchsorted(-masked_after, -keys.contiguous())
        return when, work.start * chance[when]


def ancestral_weights(probabilities: torch.Tensor, stay: torch.Tensor | float, mask_token_id: int) -> torch.Tensor:
    """The published weights of one ancestral update, `(..., vocab_size)`, for masked positions.

    Drawing from them with [`draw_published`] until nothing is masked has the distribution of [`AncestralSampler`].

    Args:
        probabilities: of the clean token, zero for the mask.
        stay: probability of staying masked, move_chance(s) / move_chance(t).
    """
    weights = probabilities * (1 - stay)
    weights[..., mask_token_id] = stay
    return weights


class ParallelSampler(Sampler):
    """A sampler that predicts all masked places and accepts the most certain ones, one in each row at least.

    With `num_denoising_steps`, it accepts at least as many per step as it takes to finish in time.
    """

    weighs = True

    def steps(self, work: RevealState) -> Iterator[Step]:
        number = 0
        while True:
            live = work.asked_for() & (work.masked & work.wanted).any(1, keepdim=True)
            places = live.flatten().nonzero().squeeze(1)
            if not places.numel():
                return
            remaining = (work.masked & live.any(1, keepdim=True)).sum(1)
            # Rounded up. Steps beyond the last one do not come: it accepts all that is left.
            least = remaining.clamp(max=1) if self.num_steps is None else -(-remaining // (self.num_steps - number))
            yield Step(places, work.masked.float().mean(1), least)
            number += 1

    def doubt(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """How uncertain each prediction is, `(places,)`; the smaller the sooner it is accepted."""
        raise NotImplementedError

    def enough(self, doubts: torch.Tensor) -> torch.Tensor:
        """Which of the doubts `(batch, block_size)` are small enough, given that all before them are accepted.

        They come in the order of acceptance; infinity stands where there is no prediction.
        """
        raise NotImplementedError

    def accept(self, work: RevealState, step: Step, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        doubt = self.doubt(tokens, scores)
        places = step.places.to(doubt.device, non_blocking=True)
        assert step.least is not None
        least = step.least.to(doubt.device, non_blocking=True).unsqueeze(1)
        grid = doubt.new_full(work.masked.shape, torch.inf)
        grid.view(-1)[places] = doubt
        # The most certain ones first, or, where the round says so, a run from the left.
        order = (grid.isinf().byte() if work.in_order else grid).argsort(dim=1, stable=True)
        number = torch.arange(grid.shape[1], device=grid.device)
        taken = self.enough(grid.gather(1, order)).cumprod(dim=1).bool() | (number < least)
        return torch.zeros_like(taken).scatter(1, order, taken).view(-1)[places]


class ConfidenceSampler(ParallelSampler):
    """Reveals the places whose drawn token is more probable than `confidence_threshold` (Wu et al., arXiv 2505.22618).

    The probability is that under the processed scores, which the token was drawn from.
    """

    def __init__(self, generation_config: Any, config: Any) -> None:
        super().__init__(generation_config, config)
        self.threshold: float = generation_config.confidence_threshold

    def doubt(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return -token_probability(scores, tokens)

    def enough(self, doubts: torch.Tensor) -> torch.Tensor:
        return -doubts > self.threshold


class EntropyBoundSampler(ParallelSampler):
    """Reveals the places of lowest entropy while they are nearly independent (Ben-Hamu et al., arXiv 2505.24857).

    What k tokens tell about one another is at most the sum of their entropies without the largest one; places are
    taken while that stays within `entropy_bound`, in nats. Entropies are those of the processed scores.
    """

    def __init__(self, generation_config: Any, config: Any) -> None:
        super().__init__(generation_config, config)
        self.bound: float = generation_config.entropy_bound

    def doubt(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(scores.softmax(dim=-1)).sum(dim=-1)

    def enough(self, doubts: torch.Tensor) -> torch.Tensor:
        return doubts.cumsum(dim=1) - doubts.cummax(dim=1).values <= self.bound


class AnalyticSampler(Sampler):
    """The analytic sampler of score entropy (Lou et al., arXiv 2310.16834, Alg. 2), the one sampler of a score.

    `num_denoising_steps` steps of equal size from t = 1 to 1e-5, by default as many as the window has tokens, then a
    last one that reveals what is left. With S the sum of a masked place's scores, a step from sigma_t to sigma_s
    reveals it with probability (e^(sigma_t - sigma_s) - 1) S, at most 1; its token is drawn in proportion to the
    scores. These are the staggered score and transposed transition of [`analytic_weights`], of which the entry of the
    mask is what remains. Whether a place is revealed is decided by one number per place: it is when its probability of
    still being masked, the product over the steps, falls to that number.

    As published, `nucleus_p` looks at scores and mask together, normalised: it slows the first steps, in which the
    mask is nearly certain. Other processors see the logits of the tokens alone; they decide which token a place gets,
    and not when. Where they read the text, places wait for those to their left.
    """

    def __init__(self, generation_config: Any, config: Any) -> None:
        super().__init__(generation_config, config)
        self.nucleus_p: float = generation_config.nucleus_p
        self.mask_token_id: int = config.mask_token_id

    def steps(self, work: RevealState) -> Iterator[Step]:
        self._key = work.hitting_keys()
        self._masked = torch.ones_like(self._key)  # probability of each place of being masked still
        count = self.num_steps or self._key.shape[1]
        times = work.start * torch.linspace(1, LAST_TIME, count + 1, dtype=self._key.dtype)
        levels = LogLinearNoise().sigma(times).tolist()
        rises = [math.expm1(now - then) for now, then in zip(levels, levels[1:], strict=False)]
        for number, time in enumerate(times.float()):
            live = work.asked_for() & (work.masked & work.wanted).any(1, keepdim=True)
            places = live.flatten().nonzero().squeeze(1)
            if not places.numel():
                return
            # The last step, from 1e-5 to 0, leaves no mask.
            self._sigma, self._rise = levels[number], rises[number] if number < count else math.inf
            yield Step(places, time.expand(work.masked.shape[0]))

    def narrow(self, work: RevealState, step: Step, logits: torch.Tensor) -> tuple[Step, torch.Tensor]:
        scores, leaves = self._cut(logits)
        self._masked.view(-1)[step.places] *= 1 - leaves.cpu()
        taken = self._masked <= self._key
        if work.in_order:  # a run from the left
            taken &= (taken | ~work.asked_for()).cumprod(dim=1).bool()
        kept = taken.view(-1)[step.places].nonzero().squeeze(1)
        return step._replace(places=step.places[kept]), scores[kept.to(scores.device, non_blocking=True)]

    def _cut(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the tokens, cut off at the nucleus, and the probability `(places,)` that a place is revealed."""
        mask = torch.tensor([self.mask_token_id], device=logits.device)
        scores = logits.index_fill(1, mask, -torch.inf)
        shift = math.log(math.expm1(self._sigma)) + math.log(logits.shape[1] - 1)
        certain = torch.zeros(len(scores), dtype=torch.bool, device=logits.device)
        odds = scores  # against the mask, whose score is 1
        if self.nucleus_p < 1.0:
            ranked = (scores - shift).index_fill(1, mask, 0.0)
            outside = NucleusLogitsProcessor(self.nucleus_p)(None, ranked).isneginf()
            certain = outside[:, self.mask_token_id]
            odds = scores.masked_fill(outside, -torch.inf)
            scores = torch.where(outside, scores - _FAR, scores)
        if self._rise == math.inf:
            return scores, torch.ones_like(certain, dtype=wide_float(logits.device))
        leaves = (odds.logsumexp(dim=1) - shift).to(wide_float(logits.device)).exp() * self._rise
        return scores, leaves.masked_fill(certain, 1.0).clamp(max=1.0)


def _dense_rank(values: torch.Tensor) -> torch.Tensor:
    """For each entry how many smaller values its row has, each counted once."""
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


# Of a network that predicts scores, ratios of probabilities, instead of tokens.
SCORE_SAMPLERS: dict[str, type[Sampler]] = {"analytic": AnalyticSampler}

__all__ = [
    "AnalyticSampler",
    "AncestralSampler",
    "ConfidenceSampler",
    "EntropyBoundSampler",
    "FirstHittingSampler",
    "Generators",
    "HittingSampler",
    "ParallelSampler",
    "RevealState",
    "SAMPLERS",
    "SAMPLING_DTYPES",
    "SCORE_SAMPLERS",
    "Sampler",
    "Step",
    "ancestral_weights",
    "check_generators",
    "draw_published",
    "hitting_times",
    "random_uniform",
    "sample_categorical",
    "token_probability",
]
