"""Bounds on the negative log-likelihood of every token of a text (arXiv 2503.09573, Eq. 8).

Three estimators, sampled, stratified and exact, differ in which masks of a block they look at and how they weigh them.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from transformers.configuration_utils import PreTrainedConfig

from .attention_bd3lm import Layout, token_layout
from .configuration_bd3lm import SAMPLING_EPS
from .loss_bd3lm import DenoisingNetwork, LossMask, check_text, cross_entropy, loss_mask, sigma_of
from .noise_bd3lm import (
    Noise,
    draw_noise,
    given_noise,
    mask_positions,
    noise_schedule,
    per_token,
    rank_in_block,
    times,
)
from .samplers_bd3lm import Generators, check_generators


Source = Noise | Generators  # the draws themselves, or where they come from

#: The exact bound sums over all masks of a block: 2^tokens - 1 passes.
MAX_EXACT_TOKENS = 8
_TOKEN_BUDGET = 2**14  # noisy tokens of one pass when scoring


class TokenNLL(NamedTuple):
    """A bound on the negative log-likelihood of each token; `nll.sum() / mask.sum()` is the mean in nats."""

    nll: torch.Tensor  # float32 (batch, length), nats, zero where mask is zero
    mask: torch.Tensor  # float32 (batch, length), 1 where a token is scored


class LanguageModel(Protocol):
    """A language model as training, evaluation, generation and upload see it; a new family implements this.

    [`LikelihoodMixin`] and [`BlockGenerationMixin`] implement all of it on top of a few hooks.
    """

    config: Any
    generation_config: Any
    has_likelihood: bool  # False: `token_nll` raises, and held-out text is scored by the training loss
    generator_per_row: bool  # `generate` also takes a list of generators, one for each row of the batch

    @property
    def exact_likelihood(self) -> bool:
        """Whether `token_nll` is the likelihood itself and not a bound."""

    @property
    def carries_interval(self) -> bool:
        """Whether the model saves an interval of noise levels, which `set_interval` changes."""

    @property
    def num_noise_samples(self) -> int:
        """Noise samples of each training sequence."""

    def token_nll(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        estimator: str = "sampled",
        num_samples: int = 1,
        generator: Generators = None,
        noise: Noise | None = None,
    ) -> TokenNLL:
        """Score every token, see [`LikelihoodMixin.token_nll`]."""

    def generate(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Continue prompts, as in transformers."""


class LikelihoodMixin:
    """The verb `token_nll`, with one signature for all language models; a subclass implements `_token_nll`."""

    config: Any
    training: bool
    has_likelihood = True
    estimators: ClassVar[tuple[str, ...]] = ("sampled", "stratified", "exact")

    @property
    def exact_likelihood(self) -> bool:
        """Whether `token_nll` is the likelihood itself and not a bound: blocks of one token are autoregressive."""
        return bool(self.config.block_size == 1)

    def token_nll(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        estimator: str = "sampled",
        num_samples: int = 1,
        generator: Generators = None,
        noise: Noise | None = None,
    ) -> TokenNLL:
        r"""Return the negative log-likelihood of every token in nats: exact, or a bound for models that denoise.

        Args:
            input_ids: `(batch, length)`, the text.
            attention_mask: `(batch, length)`, zeros for padding on either side.
            labels: `(batch, length)`, the text again, with -100 for context, which is neither masked nor scored. By
                default every token is scored except padding.
            estimator: `"sampled"`, `"stratified"` or `"exact"`, see [`nelbo`]. An autoregressive model is exact with
                any of them; a score-entropy model has no exact sum.
            num_samples: noise samples of each block, for the two random estimators.
            generator: source of randomness, or a list with one for each row, which makes the score of a row
                independent of its batch.
            noise: the noise of one `"sampled"` estimate, see [`Noise`], instead of a generator.

        Raises:
            ValueError: if the estimator is unknown or not available for this model, if `num_samples` is below 1, if
                a block has too many tokens for the exact sum, if ids are outside the vocabulary, if the text contains
                mask tokens, or if the noise does not fit the estimate or the batch.
        """
        if estimator not in self.estimators:
            raise ValueError(
                f"estimator={estimator!r} is not available for a {type(self).__name__}: choose one of "
                f"{', '.join(self.estimators)}."
            )
        check_sampling(num_samples, generator, input_ids.shape[0])
        source = source_of(noise, generator, estimator, num_samples, input_ids.shape, self.config)
        labels = input_ids if labels is None else labels
        check_text(self, input_ids, labels)
        with torch.no_grad():
            return self._token_nll(input_ids, attention_mask, labels, estimator, num_samples, source)

    def _token_nll(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        estimator: str,
        num_samples: int,
        source: Source,
    ) -> TokenNLL:
        """Score checked input; see [`token_nll`]."""
        raise NotImplementedError


def nelbo(
    model: DenoisingNetwork,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    estimator: str,
    num_samples: int,
    source: Source,
) -> TokenNLL:
    r"""Bound the negative log-likelihood of every token of a text from above (Eq. 8).

    All estimators have the expectation of Eq. 8 with t over (0, 1], which does not depend on the noise schedule: given
    that k of the n maskable tokens of a block are masked, all \\(\binom{n}{k}\\) masks are equally likely, and
    \\(\int_0^1 \frac1t \binom nk t^k (1-t)^{n-k} dt = \frac1k\\). So a mask with k tokens has the weight
    \\(1 / (k \binom nk)\\).

    - `"sampled"`, the paper's: t stratified over the blocks of the batch on [1e-3, 1], the weight of the model's noise
      schedule (1/t), `num_samples` draws. It leaves out the times below 1e-3, and with them the masks below
      move_chance(1e-3): 0.1 % masked for `loglinear`, `square` and `log`, where the bias is of that order, but 3 %
      for `square_root`, whose expectation is up to 3 % too low. `cosine` is up to 1 % too low, since its published
      weight adds eps to the denominator.
    - `"stratified"`: k uniform on 1..n, a uniform mask of that size, weight n/k. Unbiased because k has probability
      1/n instead of weight 1/k. No sample is wasted on an empty mask and no weight exceeds n, so the variance is
      lower. The samples of one block spread k over 1..n.
    - `"exact"`: the sum over all 2^n - 1 masks of each block; no randomness. n is at most 8.

    The clean stream is computed once for all samples. A model of block size 1 has a single mask per block, so every
    estimator gives its exact autoregressive likelihood. Call it without gradients.
    """
    config = model.config
    if estimator != "sampled" and config.time_conditioning:
        raise ValueError(
            f"estimator={estimator!r} sums over masks of all noise levels at once, but this model has "
            f"time_conditioning=True: use estimator='sampled'."
        )
    layout = token_layout(attention_mask, input_ids.shape[1], config.block_size, device=input_ids.device)
    scored = loss_mask(layout, labels, ignore_bos=config.ignore_bos, training=False)
    draws = _ESTIMATORS[estimator](model, layout, scored, num_samples, source)
    return TokenNLL(_sum_over_masks(model, input_ids, layout, draws), scored.counted.float())


def check_sampling(num_samples: int, generator: Generators, batch: int) -> None:
    """Refuse fewer than one draw, or a list of generators that does not have one for each row."""
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: give at least 1.")
    check_generators(generator, batch)


def source_of(
    noise: Noise | None,
    generator: Generators,
    estimator: str,
    num_samples: int,
    shape: torch.Size,
    config: PreTrainedConfig,
) -> Source:
    """The draws that a caller gave for a batch of `shape`, or where they come from.

    Raises:
        ValueError: the draws are not those of one sampled estimate, or do not fit the batch.
    """
    if noise is None:
        return generator
    if estimator != "sampled" or num_samples != 1 or noise.draws != 1:
        raise ValueError(
            f"noise holds the draws of one sampled estimate, but estimator={estimator!r}, num_samples={num_samples} "
            f"and draws={noise.draws}: use estimator='sampled' with one draw, or leave noise out."
        )
    return given_noise(*noise, shape, config)


class Mask(NamedTuple):
    """One draw for every block of a batch."""

    masked: torch.Tensor  # bool (batch, length)
    weights: torch.Tensor  # (batch, length), weight of each position's loss, the share of this draw included
    move_chance: torch.Tensor | None  # (batch, num_blocks), for time conditioning


def _sampled(
    model: DenoisingNetwork, layout: Layout, scored: LossMask, num_samples: int, source: Source
) -> Iterator[Mask]:
    """Draws of t on [1e-3, 1] as published; a single full mask at block size 1."""
    config = model.config
    if config.block_size == 1:
        yield Mask(scored.maskable, scored.maskable.float(), None)
        return
    order = config.antithetic_sampling
    for _ in range(num_samples):
        noise = rows_of_noise(model, scored, order, source)
        level = noise_schedule(config.noise)(times(noise.block_noise, SAMPLING_EPS, 1.0))
        masked = mask_positions(noise, level.move_chance, layout.block_ids) & scored.maskable
        weights = per_token(-level.loss_scaling, layout.block_ids) / num_samples
        yield Mask(masked, weights, level.move_chance)


def stratified_masks(
    model: DenoisingNetwork, layout: Layout, scored: LossMask, num_samples: int, source: Source
) -> Iterator[Mask]:
    """Draws of the number k of masked tokens, spread over 1..n; weight n/k."""
    batch, length = scored.counted.shape
    blocks = model.config.num_blocks(length)
    device = scored.counted.device
    block_ids = layout.block_ids.expand(batch, -1)
    sizes = torch.zeros(batch, blocks, device=device).scatter_add_(1, block_ids, scored.maskable.float())
    shift = rows_of_noise(model, scored, "none", source).block_noise
    for sample in range(num_samples):
        noise = rows_of_noise(model, scored, "shuffled", source)
        # A single draw is stratified over the blocks of the batch; several are spread evenly over each block's 1..n.
        place = noise.block_noise if num_samples == 1 else (sample + shift) / num_samples
        chosen = torch.minimum((place * sizes).floor() + 1, sizes)
        masked = rank_in_block(noise.token_noise, block_ids, scored.maskable) < per_token(chosen, block_ids)
        weights = sizes / chosen.clamp(min=1) / num_samples
        yield Mask(masked & scored.maskable, per_token(weights, block_ids), None)


def _exact(
    model: DenoisingNetwork, layout: Layout, scored: LossMask, num_samples: int, source: Source
) -> Iterator[Mask]:
    """Every mask of a block once, with the weight 1 / (k C(n, k)).

    What may be masked in a block is numbered, so that a few tokens behind a context cost few passes at any block size.
    """
    batch, length = scored.counted.shape
    block_ids = layout.block_ids.expand(batch, -1)
    sizes = torch.zeros(batch, model.config.num_blocks(length), device=block_ids.device, dtype=torch.float64)
    n = sizes.scatter_add(1, block_ids, scored.maskable.double())
    most = int(n.max())
    if most > MAX_EXACT_TOKENS:
        raise ValueError(
            f"estimator='exact' at block_size={model.config.block_size} needs 2^{most} - 1 passes; the limit is "
            f"{MAX_EXACT_TOKENS} tokens to score in a block, {2**MAX_EXACT_TOKENS - 1} passes. Use "
            f"estimator='stratified' with num_samples."
        )
    place = rank_in_block((layout.position_ids / length).expand(batch, -1), block_ids, scored.maskable)

    def masks() -> Iterator[Mask]:
        for pattern in range(1, 2**most):
            picked = (torch.tensor(pattern, device=place.device) >> place) & 1 > 0
            masked = picked & scored.maskable
            k = sizes.scatter_add(1, block_ids, masked.double())
            log_binomial = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
            weights = torch.where(k > 0, (-log_binomial).exp() / k.clamp(min=1), 0.0)
            # A pattern with more tokens than a block has equals one without these: count it once.
            wanted = torch.full_like(k, bin(pattern).count("1"))
            weights = torch.where(k == wanted, weights, 0.0)
            masked = masked & (per_token(weights, block_ids) > 0)
            yield Mask(masked, per_token(weights, block_ids).float(), None)

    return masks()


_ESTIMATORS = {"sampled": _sampled, "stratified": stratified_masks, "exact": _exact}


def rows_of_noise(model: DenoisingNetwork, scored: LossMask, order: str, source: Source) -> Noise:
    """Noise of a batch; with a generator per row, a row's draws are those it would get alone and without padding."""
    batch, length = scored.valid.shape
    device, blocks = scored.valid.device, model.config.num_blocks(length)
    if isinstance(source, Noise):
        return Noise(*(field.to(device) for field in source))
    if not isinstance(source, list):
        return draw_noise(batch, blocks, length, order=order, device=device, generator=source)
    noise = Noise(*(torch.zeros(batch, size, device=device) for size in (blocks, length, blocks)))
    for row, generator in enumerate(source):
        tokens = int(scored.valid[row].sum())
        # As for a whole window, so that texts which begin alike are compared with the same draws, whatever their
        # length. Strata that are dealt in order must be those of the text's own blocks.
        drawn = tokens if order == "published" else max(tokens, model.config.model_length)
        own = draw_noise(1, model.config.num_blocks(drawn), drawn, order=order, device=device, generator=generator)
        own_blocks = model.config.num_blocks(tokens)
        noise.token_noise[row, scored.valid[row]] = own.token_noise[0, :tokens]
        noise.block_noise[row, :own_blocks] = own.block_noise[0, :own_blocks]
        noise.count_noise[row, :own_blocks] = own.count_noise[0, :own_blocks]
    return noise


def _sum_over_masks(
    model: DenoisingNetwork, input_ids: torch.Tensor, layout: Layout, draws: Iterator[Mask]
) -> torch.Tensor:
    """Sum of weighted losses over draws, `(batch, length)`."""
    nll = torch.zeros(input_ids.shape, device=input_ids.device)
    for draw, losses in mask_losses(model, input_ids, layout, draws):
        nll += losses * draw.weights
    return nll


def mask_losses(
    model: DenoisingNetwork, input_ids: torch.Tensor, layout: Layout, draws: Iterator[Mask]
) -> Iterator[tuple[Mask, torch.Tensor]]:
    """-log p(x_0 | x_t) of the tokens that each draw masks, `(batch, length)`, zero elsewhere; without weights.

    The clean stream is computed once for all draws, unless the model is time-conditioned. To be iterated without
    gradients.
    """
    batch, length = input_ids.shape
    conditioned, lone = model.config.time_conditioning, model.config.num_blocks(length) == 1
    cache = None if conditioned or lone else model.clean_cache(input_ids, layout)
    group_size = 1 if conditioned else max(1, _TOKEN_BUDGET // (batch * length))
    for group in _grouped(draws, group_size):
        masked = torch.stack([draw.masked for draw in group], dim=1)
        rows = masked.flatten().nonzero().squeeze(1)
        x_t = torch.where(masked, model.config.mask_token_id, input_ids.unsqueeze(1)).flatten(1)
        sigma = sigma_of(model.config, group[0].move_chance)
        hidden = model.noisy_hidden(x_t, input_ids, layout, rows, sigma, cache=cache, num_noise_samples=len(group))
        # Rows of (batch, draw, position) belong to the token (batch, position).
        token = rows // (len(group) * length) * length + rows % length
        losses = torch.zeros(masked.numel(), device=input_ids.device)
        losses[rows] = cross_entropy(hidden, model.logits_head(), input_ids.flatten()[token], model.config)
        yield from zip(group, losses.view(masked.shape).unbind(1), strict=True)


def _grouped(draws: Iterator[Mask], size: int) -> Iterator[list[Mask]]:
    group: list[Mask] = []
    for draw in draws:
        group.append(draw)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


__all__ = [
    "MAX_EXACT_TOKENS",
    "Generators",
    "LanguageModel",
    "LikelihoodMixin",
    "Mask",
    "Source",
    "TokenNLL",
    "check_sampling",
    "mask_losses",
    "nelbo",
    "rows_of_noise",
    "source_of",
    "stratified_masks",
]
