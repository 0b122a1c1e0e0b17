"""Score entropy discrete diffusion (SEDD, arXiv 2310.16834) with an absorbing state, a baseline of BD3-LM.

The network gives the score s(x_t, sigma)_v, an estimate of the ratio p_t(x_t with v at a position) / p_t(x_t). With
the mask absorbing, only masked positions have ratios to learn. Log-scores are, as published,

    log s_v = logits_v - log(e^sigma - 1) - log(V - 1),     and 0 for the current token of x_t.

Score entropy (Eq. 5): at a masked position whose clean token is x_0, with the true ratio r = 1 / (e^sigma - 1),

    SE = sum over v != M of s_v  -  r log s_{x_0}  +  r (log r - 1)  >=  0.
"""

import math
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.generation.logits_process import LogitsProcessorList

from .compatibility_bd3lm import register_auto_classes
from .configuration_bd3lm import SAMPLING_EPS, SEDDConfig
from .generation_config_bd3lm import SEDDGenerationConfig
from .inputs_bd3lm import Layout, check_text, token_layout
from .likelihood_bd3lm import ScoringRequest, TokenNLL, noise_of_batch
from .logits_process_bd3lm import NucleusLogitsProcessor
from .loss_bd3lm import LossMask, corrupt, divide_by_count, loss_mask, masked_indices, move_chance_bound
from .modeling_bd3lm import BD3LMForMaskedLM
from .modeling_mdlm import MDLMModel
from .noise_bd3lm import LogLinearNoise, Noise
from .samplers_bd3lm import SCORE_SAMPLERS


_LOGIT_BUDGET = 2**23  # logits alive at a time


def score_entropy(
    logits: torch.Tensor, targets: torch.Tensor, sigma: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """Return the score entropy of masked positions, `(rows,)`, from their raw float32 logits `(rows, vocab_size)`.

    Args:
        targets: the clean tokens `(rows,)`.
        sigma: noise level of each row, `(rows,)`.
    """
    log_expm1 = torch.expm1(sigma).log()
    shift = log_expm1 + math.log(logits.shape[-1] - 1)
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
    # The three terms of the entropy in the module's docstring, in its order.
    others = logits.masked_fill(is_mask, -torch.inf)
    positive = (others.logsumexp(dim=1) - shift).exp()
    ratio = (-log_expm1).exp()
    target = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - shift
    return positive - ratio * target + ratio * (-log_expm1 - 1)


class SEDDModel(MDLMModel):
    """The backbone with attention over the whole sequence, conditioned on the noise level of each sequence."""

    config_class = SEDDConfig


class SEDDForMaskedLM(BD3LMForMaskedLM):
    """Score entropy language model. `model(x_t, timesteps=sigma).logits` are raw, with attention over the whole text.

    `generate` samples by the scores, see [`AnalyticSampler`]: one forward pass per step, and a last one that reveals
    the rest. Logits processors see the logits of the tokens, which are log-scores up to a constant: they affect which
    token a position gets, but not when. Prompts, windows and stopping rules are as for masked diffusion.
    """

    config_class = SEDDConfig
    backbone_class = SEDDModel
    generation_config_class = SEDDGenerationConfig
    samplers = SCORE_SAMPLERS
    estimators = ("sampled", "stratified")  # no exact sum over masks: a score depends on a continuous noise level

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        # The score sampler applies the nucleus itself, since it depends on the noise level.
        processors = super()._get_logits_processor(*args, **kwargs)
        return LogitsProcessorList(p for p in processors if not isinstance(p, NucleusLogitsProcessor))

    def objective(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        noise: Noise | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the score entropy in nats per token, weighted by d sigma / dt (Eq. 7): a scalar with a gradient."""
        check_text(self.config, input_ids, labels, attention_mask)
        layout = token_layout(attention_mask, input_ids.shape[1], self.config.block_size, device=input_ids.device)
        scored = loss_mask(layout, labels, ignore_bos=self.config.ignore_bos, training=self.training)
        if noise is None:
            noise = noise_of_batch(self, scored, self.config.antithetic_sampling, None)
        losses, _ = self._losses(input_ids, labels, layout, scored, noise)
        return divide_by_count(losses.sum(), scored.counted, num_items_in_batch)

    def _token_nll(self, request: ScoringRequest) -> TokenNLL:
        """Bound the negative log-likelihood with times t drawn on [1e-3, 1].

        `"sampled"` stratifies the t of each sample over the batch; `"stratified"` spaces the t of each text evenly
        over the interval.
        """
        input_ids, config, num_samples = request.input_ids, self.config, request.num_samples
        layout = token_layout(request.attention_mask, input_ids.shape[1], config.block_size, device=input_ids.device)
        scored = loss_mask(layout, request.labels, ignore_bos=config.ignore_bos, training=False)
        nll = torch.zeros(input_ids.numel(), device=input_ids.device)
        shift = None
        for sample in range(num_samples):
            noise = noise_of_batch(self, scored, config.antithetic_sampling, request.source)
            if request.estimator == "stratified" and num_samples > 1:
                # One uniform number per row shifts an even grid of times: unbiased, with one time in each n-th of the
                # interval.
                shift = noise.block_noise if shift is None else shift
                noise = noise._replace(block_noise=(sample + shift) / num_samples)
            losses, indices = self._losses(input_ids, request.labels, layout, scored, noise)
            nll.index_add_(0, indices, losses.float() / num_samples)
        return TokenNLL(nll.view_as(input_ids), scored.counted.float())

    def _losses(
        self, input_ids: torch.Tensor, labels: torch.Tensor, layout: Layout, scored: LossMask, noise: Noise
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted losses of the masked positions and their flat indices, both `(masked_indices,)`."""
        low, high = self.interval() if self.training else (SAMPLING_EPS, 1.0)
        masked, weights, move_chance = corrupt(self, layout, scored, noise, low, high)
        bound = move_chance_bound(self.config, low, high, self.training)
        indices, is_masked = masked_indices(masked, bound, self.config)
        x_t = torch.where(masked, self.config.mask_token_id, input_ids)
        sigma = LogLinearNoise().sigma(move_chance[:, 0])
        hidden = self.noisy_hidden(x_t, input_ids, layout, indices, sigma)
        sigma_of_index = sigma[indices // input_ids.shape[1]]
        targets = labels.flatten()[indices].clamp(min=0)  # index 0, which fills up the indices, may be context
        losses = self._score_entropies(hidden, targets, sigma_of_index)
        # The weight is -alpha'_t / (1 - alpha_t); times 1 / ratio it is d sigma / dt.
        losses = losses * weights.flatten()[indices] * torch.expm1(sigma_of_index)
        return losses if is_masked is None else torch.where(is_masked == 0, 0.0, losses * is_masked), indices

    def _score_entropies(self, hidden: torch.Tensor, targets: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return the score entropy of each row in chunks, whose logits the backward pass recomputes."""
        head = self.logits_head()

        def of_chunk(hidden: torch.Tensor, targets: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return score_entropy(head(hidden).float(), targets, sigma, self.config.mask_token_id)

        # Chunks bound the logits that are alive at a time; checkpointing drops them until the backward pass.
        step = max(1, _LOGIT_BUDGET // self.config.vocab_size)
        parts = zip(hidden.split(step), targets.split(step), sigma.split(step), strict=True)
        # Without a masked position there is one empty part: every process needs a gradient to average.
        return torch.cat([checkpoint(of_chunk, *part, use_reentrant=False) for part in parts])


register_auto_classes(SEDDForMaskedLM, "AutoModelForMaskedLM", "AutoModelForCausalLM", backbone=SEDDModel)

__all__ = ["SEDDForMaskedLM", "SEDDModel", "score_entropy"]
