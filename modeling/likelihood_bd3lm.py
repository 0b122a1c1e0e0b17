"""Per-token likelihoods of text, or bounds on them (arXiv 2503.09573, Eq. 8), and the protocol of a language model.

The three estimators of the bound, sampled, stratified and exact, differ in which masks of a block they evaluate and in
the weights of these masks.
"""

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from .configuration_bd3lm import SAMPLING_EPS
from .inputs_bd3lm import (
    Layout,
    check_attention_mask,
    check_ids,
    check_text,
    default_labels,
    find_documents,
    padding_mask,
    token_layout,
)
from .loss_bd3lm import Corruption, LossMask, cross_entropy, loss_mask, sigma_of
from .noise_bd3lm import (
    Noise,
    draw_noise,
    mask_exact_numbers,
    mask_positions,
    noise_from_arguments,
    noise_schedule,
    per_token,
    rank_in_block,
    times,
    tokens_per_block,
    wide_float,
)
from .samplers_bd3lm import Generators, check_generators


NoiseSource = Noise | Generators  # the noise itself, or the generators to draw it from

#: The exact bound sums over all masks of a block: 2^tokens - 1 forward passes.
MAX_EXACT_TOKENS = 8
_TOKEN_BUDGET = 2**14  # noisy tokens of one forward pass when scoring


class TokenNLL(NamedTuple):
    """The negative log-likelihood of each token or a bound on it; `nll.sum() / mask.sum()` is the mean in nats."""

    nll: torch.Tensor  # float32 (batch, length), nats, zero where mask is zero
    mask: torch.Tensor  # float32 (batch, length), 1 where a token is scored


class LanguageModel(Protocol):
    """The interface that training, evaluation, generation and upload need; a new family implements it.

    [`LikelihoodMixin`] and [`BlockGenerationMixin`] implement all of it on top of a few hooks.
    """

    config: Any
    generation_config: Any
    has_likelihood: bool  # False: `token_nll` raises, and held-out text is scored by the training loss
    generator_per_row: bool  # `generate` also takes a list of generators, one per row of the batch

    @property
    def exact_likelihood(self) -> bool:
        """Whether `token_nll` is the likelihood itself rather than a bound."""

    @property
    def carries_interval(self) -> bool:
        """Whether the model saves an interval of noise levels, which `set_interval` changes."""

    @property
    def num_noise_samples(self) -> int:
        """Number of noise samples per training sequence."""

    # Untyped arguments, so that only the mixin defines them.
    def token_nll(self, *args: Any, **kwargs: Any) -> TokenNLL:
        """Score every token, see [`LikelihoodMixin.token_nll`]."""

    def generate(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Continue prompts, as in transformers."""


class ScoringRequest(NamedTuple):
    """The arguments of [`LikelihoodMixin.token_nll`], checked and completed."""

    input_ids: torch.Tensor  # (batch, length)
    attention_mask: torch.Tensor | None  # (batch, length)
    labels: torch.Tensor  # (batch, length)
    estimator: str
    num_samples: int
    source: NoiseSource


class LikelihoodMixin:
    """The method `token_nll`, with one signature for all language models."""

    config: Any
    training: bool
    has_likelihood = True
    estimators: ClassVar[tuple[str, ...]] = ("sampled", "stratified", "exact")

    @property
    def exact_likelihood(self) -> bool:
        """Whether `token_nll` is the likelihood itself rather than a bound, as for blocks of one token."""
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
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> TokenNLL:
        r"""Return the negative log-likelihood of every token in nats: exact, or a bound for denoising models.

        Args:
            input_ids: `(batch, length)`, the text.
            attention_mask: `(batch, length)`, zeros for padding on either side.
            labels: `(batch, length)`, the tokens to score, usually a copy of `input_ids`, with -100 for context, which
                is neither masked nor scored. By default every token is scored except padding.
            estimator: `"sampled"`, `"stratified"` or `"exact"`, see [`nelbo`]. An autoregressive model is exact with
                any of them; a score-entropy model has no exact sum.
            num_samples: noise samples per block, for the two random estimators.
            generator: source of randomness, or a list of one per row, which makes the score of a row independent of
                its batch.
            noise: the noise of one `"sampled"` estimate, see [`Noise`], instead of a generator.
            position_ids: `(batch or 1, length)`; where they restart at 0, a new document begins, scored separately.
            token_type_ids: ignored; some tokenizers return them.

        Raises:
            ValueError: if the estimator is unknown or not available for this model, if `num_samples` is below 1, if
                a block has too many tokens for the exact sum, if ids are outside the vocabulary, if the text contains
                mask tokens, or if the noise or the generators do not fit the estimate or the batch.
        """
        if estimator not in self.estimators:
            raise ValueError(
                f"estimator={estimator!r} is not available for a {type(self).__name__}: choose one of "
                f"{', '.join(self.estimators)}."
            )
        self.config.check_block_size()
        check_ids(input_ids, "input_ids")
        check_attention_mask(attention_mask, input_ids.shape)
        # 1. Split packed documents into rows, scored by a second call
        documents = find_documents(position_ids, attention_mask, input_ids.shape)
        if documents is not None:
            if isinstance(generator, list):
                raise ValueError(
                    f"generator is a list of {len(generator)}, and position_ids put several documents in a row: pass "
                    f"a single generator, or score each document as a row of its own."
                )
            labels = default_labels(input_ids, attention_mask) if labels is None else labels
            ids, labels, mask = documents.split(input_ids, labels)
            options: dict[str, Any] = {"estimator": estimator, "num_samples": num_samples}
            options |= {"generator": generator, "noise": noise}
            scores = self.token_nll(ids, mask, labels=labels, **options)
            return TokenNLL(*(documents.join(values, input_ids.shape) for values in scores))
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: give at least 1.")
        # 2. Check the noise or generators and the text before any forward pass
        check_generators(generator, input_ids.shape[0])
        source: NoiseSource = generator
        if noise is not None:
            if estimator != "sampled" or num_samples != 1 or noise.num_noise_samples() != 1:
                raise ValueError(
                    f"noise with num_noise_samples={noise.num_noise_samples()}, estimator={estimator!r} and "
                    f"num_samples={num_samples} do not fit: noise is for a single sampled estimate. Use "
                    f"estimator='sampled' with one sample, or leave noise out."
                )
            source = noise_from_arguments(*noise, input_ids.shape, self.config)
        attention_mask = padding_mask(attention_mask, may_synchronize=True)
        labels = default_labels(input_ids, attention_mask) if labels is None else labels
        check_text(self.config, input_ids, labels, attention_mask, may_synchronize=True)
        # 3. Run the model's estimator
        with torch.no_grad():
            return self._token_nll(ScoringRequest(input_ids, attention_mask, labels, estimator, num_samples, source))

    def _token_nll(self, request: ScoringRequest) -> TokenNLL:
        """Score checked input; see [`token_nll`]. A model that does not denoise, or predicts scores, overrides it."""
        return nelbo(self, request)


def nelbo(model: Any, request: ScoringRequest) -> TokenNLL:
    r"""Bound the negative log-likelihood of every token of a text from above (Eq. 8).

    All estimators target Eq. 8 with t over (0, 1], whose value does not depend on the noise schedule: given that k of
    the n maskable tokens of a block are masked, all \\(\binom{n}{k}\\) masks are equally likely, and
    \\(\int_0^1 \frac1t \binom nk t^k (1-t)^{n-k} dt = \frac1k\\). So a mask with k tokens has the weight
    \\(1 / (k \binom nk)\\).

    - `"sampled"`, the paper's: t stratified over the blocks of the batch on [1e-3, 1], the weight of the model's noise
      schedule (1/t), `num_samples` samples. It leaves out times below 1e-3, and with them mask rates below
      move_chance(1e-3): about 0.1 % for `loglinear`, `square` and `log`, where the bias is of that order, but 3 % for
      `square_root`, whose expectation is up to 3 % too low. `cosine` is up to 1 % too low, since its published weight
      adds eps to the denominator.
    - `"stratified"`: k uniform on 1..n, a uniform mask of that size, weight n/k. Unbiased because k has probability
      1/n instead of weight 1/k. No sample is wasted on an empty mask and no weight exceeds n, so the variance is
      lower. The samples of one block spread k over 1..n.
    - `"exact"`: the sum over all 2^n - 1 masks of each block, without randomness. n is at most 8.

    The clean stream is computed once for all samples. A model of block size 1 has a single mask per block, so every
    estimator gives its exact autoregressive likelihood. Call it under `torch.no_grad()`.
    """
    config, input_ids = model.config, request.input_ids
    if request.estimator != "sampled" and config.time_conditioning:
        raise ValueError(
            f"estimator={request.estimator!r} sums over masks of all noise levels at once, but this model has "
            f"time_conditioning=True: use estimator='sampled'."
        )
    layout = token_layout(request.attention_mask, input_ids.shape[1], config.block_size, device=input_ids.device)
    scored = loss_mask(layout, request.labels, ignore_bos=config.ignore_bos, training=False)
    samples = _ESTIMATORS[request.estimator](model, layout, scored, request.num_samples, request.source)
    nll = torch.zeros(input_ids.shape, device=input_ids.device)
    for sample, losses in mask_losses(model, input_ids, layout, samples, request.labels):
        nll += losses * sample.weights
    return TokenNLL(nll, scored.counted.float())


def _sampled(
    model: Any, layout: Layout, scored: LossMask, num_samples: int, source: NoiseSource
) -> Iterator[Corruption]:
    """Draw t on [1e-3, 1] as published; a single full mask at block size 1."""
    config = model.config
    if config.block_size == 1:
        # All tokens are masked at t = 1, the noise level of a time-conditioned model.
        yield Corruption(scored.maskable, scored.maskable.float(), torch.ones_like(scored.counted[:, :1]).float())
        return
    for _ in range(num_samples):
        noise = noise_of_batch(model, scored, config.antithetic_sampling, source)
        level = noise_schedule(config.noise)(times(noise.block_noise, SAMPLING_EPS, 1.0))
        masked = mask_positions(noise, level.move_chance, layout.block_ids) & scored.maskable
        weights = per_token(-level.loss_scaling, layout.block_ids) / num_samples
        yield Corruption(masked, weights, level.move_chance)


def stratified_masks(
    model: Any, layout: Layout, scored: LossMask, num_samples: int, source: NoiseSource
) -> Iterator[Corruption]:
    """Draw the number k of masked tokens, spread over 1..n; weight n/k."""
    # Drawn even for a single sample, which ignores it, so that the noise of a seed does not depend on `num_samples`.
    shift = noise_of_batch(model, scored, "none", source).block_noise
    for sample in range(num_samples):
        noise = noise_of_batch(model, scored, "shuffled", source)
        # A single sample is stratified over the blocks of the batch; several are spread over 1..n in each block.
        if num_samples > 1:
            noise = noise._replace(block_noise=(sample + shift) / num_samples)
        masked, weights = mask_exact_numbers(noise, layout.block_ids, scored.maskable, SAMPLING_EPS, 1.0)
        yield Corruption(masked, weights / num_samples, None)


def _exact(
    model: Any, layout: Layout, scored: LossMask, _num_samples: int, _source: NoiseSource
) -> Iterator[Corruption]:
    """Yield every mask of a block once, with the weight 1 / (k C(n, k)).

    Masks range over the maskable tokens of a block only, so a few tokens after a context cost few forward passes at
    any block size.
    """
    batch, length = scored.counted.shape
    block_ids, num_blocks = layout.block_ids.expand(batch, -1), model.config.num_blocks(length)
    wide = wide_float(block_ids.device)
    # Only maskable tokens count: a BOS token or a prompt adds no masks.
    n = tokens_per_block(scored.maskable, block_ids, num_blocks).to(wide)
    n_max = int(n.max())
    if n_max > MAX_EXACT_TOKENS:
        raise ValueError(
            f"estimator='exact' at block_size={model.config.block_size} needs 2^{n_max} - 1 forward passes; the limit "
            f"is {MAX_EXACT_TOKENS} scored tokens per block, {2**MAX_EXACT_TOKENS - 1} passes. Use "
            f"estimator='stratified' with num_samples."
        )
    # Positions increase along a row, so ranking them numbers the maskable tokens of each block from left to right.
    number = rank_in_block((layout.position_ids / length).expand(batch, -1), block_ids, scored.maskable, num_blocks)

    def masks() -> Iterator[Corruption]:
        for pattern in range(1, 2**n_max):
            masked = ((torch.tensor(pattern, device=number.device) >> number) & 1 > 0) & scored.maskable
            k = tokens_per_block(masked, block_ids, num_blocks).to(wide)
            # The weight 1 / (k C(n, k)) of [`nelbo`], by lgamma since n differs from block to block.
            log_binomial = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
            # A pattern that masks tokens beyond the end of a block repeats a shorter one: count it once.
            weights = torch.where(k == pattern.bit_count(), (-log_binomial).exp() / k.clamp(min=1), 0.0)
            masked = masked & (per_token(weights, block_ids) > 0)
            yield Corruption(masked, per_token(weights, block_ids).float(), None)

    return masks()


_ESTIMATORS = {"sampled": _sampled, "stratified": stratified_masks, "exact": _exact}


def noise_of_batch(model: Any, scored: LossMask, order: str, source: NoiseSource) -> Noise:
    """Return the noise of a batch. With a generator per row, each row gets the noise it would get alone, unpadded."""
    batch, length = scored.valid.shape
    device, blocks = scored.valid.device, model.config.num_blocks(length)
    if isinstance(source, Noise):
        return Noise(*(field.to(device) for field in source))
    if not isinstance(source, list):
        return draw_noise(batch, blocks, length, order=order, device=device, generator=source)
    noise = Noise(*(torch.zeros(batch, size) for size in (blocks, length, blocks)))
    # Rows are drawn one by one and written to the columns of their tokens, so that padding uses no random numbers.
    valid = scored.valid.cpu()
    for row, generator in enumerate(source):
        tokens = int(valid[row].sum())
        # Drawn for a whole window, so that texts of any length with the same beginning get the same noise there. In
        # published order the strata depend on the number of blocks, which must be that of the text.
        drawn = tokens if order == "published" else max(tokens, model.config.model_length)
        own = draw_noise(1, model.config.num_blocks(drawn), drawn, order=order, generator=generator)
        own_blocks = model.config.num_blocks(tokens)
        noise.token_noise[row, valid[row]] = own.token_noise[0, :tokens].cpu()
        noise.block_noise[row, :own_blocks] = own.block_noise[0, :own_blocks].cpu()
        noise.count_noise[row, :own_blocks] = own.count_noise[0, :own_blocks].cpu()
    return Noise(*(field.to(device) for field in noise))


def mask_losses(
    model: Any,
    input_ids: torch.Tensor,
    layout: Layout,
    samples: Iterator[Corruption],
    labels: torch.Tensor | None = None,
) -> Iterator[tuple[Corruption, torch.Tensor]]:
    """Yield unweighted -log p(x_0 | x_t) of the tokens that each sample masks, `(batch, length)`, zero elsewhere.

    The clean stream is computed once for all samples, unless the model is time-conditioned. Iterate under `no_grad`.

    Args:
        labels: `(batch, length)`, the targets where tokens are masked; by default the text.
    """
    batch, length = input_ids.shape
    targets = input_ids if labels is None else labels
    conditioned, single_block = model.config.time_conditioning, model.config.num_blocks(length) == 1
    # A cache holds the clean stream at one noise level only. A single block has no earlier block to read.
    cache = None if conditioned or single_block else model.clean_cache(input_ids, layout)
    # Several samples of a text share a forward pass, up to the number of tokens that a CPU processes efficiently.
    group_size = 1 if conditioned else max(1, _TOKEN_BUDGET // (batch * length))
    while group := list(itertools.islice(samples, group_size)):
        masked = torch.stack([sample.masked for sample in group], dim=1)
        indices = masked.flatten().nonzero().squeeze(1)
        x_t = torch.where(masked, model.config.mask_token_id, input_ids.unsqueeze(1)).flatten(1)
        sigma = sigma_of(model.config, group[0].move_chance)
        hidden = model.noisy_hidden(x_t, input_ids, layout, indices, sigma, cache=cache, num_noise_samples=len(group))
        # An index into (batch, sample, position) belongs to the token (batch, position).
        token = indices // (len(group) * length) * length + indices % length
        losses = torch.zeros(masked.numel(), device=input_ids.device)
        losses[indices] = cross_entropy(hidden, model.logits_head(), targets.flatten()[token], model.config)
        yield from zip(group, losses.view(masked.shape).unbind(1), strict=True)
