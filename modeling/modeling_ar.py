"""The autoregressive baseline of BD3-LM (arXiv 2503.09573, Sec. 6): the same layers, causal and without adaLN.

log p(x) = sum over i of log p(x_i | x_<i); the first token of a text is given. As published, the vocabulary keeps the
mask token, which has probability zero.
"""

from typing import Any, cast

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.utils import can_return_tuple

from .attention_bd3lm import block_causal_plan, token_layout
from .configuration_bd3lm import ARConfig
from .generation_bd3lm import BD3LMGenerationMixin
from .generation_config_bd3lm import BD3LMGenerationConfig
from .head_bd3lm import cross_entropy, weighted_cross_entropy
from .likelihood_bd3lm import TokenNLL
from .loss_bd3lm import check_text
from .modeling_bd3lm import BD3LMLanguageModel, BD3LMModel
from .noise_bd3lm import Noise
from .pretrained_bd3lm import BD3LMOutput, register_auto_classes


class ARModel(BD3LMModel):
    """The backbone with causal attention."""

    config_class = ARConfig


class ARForCausalLM(BD3LMGenerationMixin, BD3LMLanguageModel):
    """Autoregressive language model: exact likelihoods by `token_nll`, text by `generate` with an exact cache."""

    config_class = ARConfig
    backbone_class = ARModel
    generation_config_class = BD3LMGenerationConfig
    accepts_loss_kwargs = True
    exact_likelihood = True
    # One token after the other: transformers' own loop. The paper's nucleus and stop rules are those of the mixin.
    _sample = GenerationMixin._sample  # type: ignore[assignment]

    def __init__(self, config: ARConfig) -> None:
        super().__init__(config)
        self._adopt_special_tokens()
        self.post_init()

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        # The mask token has probability zero, before anything else looks at the scores.
        processors.insert(0, SuppressTokensLogitsProcessor([self.config.mask_token_id], device=str(self.device)))
        return processors

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> BD3LMOutput:
        """Next-token logits `(batch, length, vocab_size)`, raw, or the loss.

        Args:
            input_ids: `(batch, length)`; behind a cache, its continuation.
            attention_mask: `(batch, cached + length)`, zeros for padding on either side.
            labels: `(batch, length)`, the text itself, not shifted; -100 marks what is given. The loss is the mean
                negative log-likelihood in nats of the labelled tokens that have a token before them.
            logits_to_keep: give the logits of the last so many positions, or of the positions in a tensor; 0: of all.
            num_items_in_batch: tokens to divide the summed loss by, when a step spans several batches or processes.

        Raises:
            ValueError: ids outside the vocabulary, or labels without input_ids.
        """
        if labels is not None:
            if input_ids is None:
                raise ValueError("labels need input_ids: the loss compares the text with itself, one token on.")
            return BD3LMOutput(loss=self._loss(input_ids, labels, attention_mask, num_items_in_batch))
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **{k: kwargs[k] for k in ("output_hidden_states", "output_attentions") if k in kwargs},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return BD3LMOutput(
            logits=self.backbone.output_layer(outputs.last_hidden_state[:, kept]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        predicted = self._predicted(input_ids, labels, attention_mask)
        hidden, targets = self._before(predicted, input_ids, labels, attention_mask)
        weights = torch.ones_like(targets, dtype=torch.float32)
        head, mask = self.get_output_embeddings(), self.config.mask_token_id
        total = weighted_cross_entropy(hidden, head, targets, weights, mask)
        count = max(1, targets.numel()) if num_items_in_batch is None else num_items_in_batch
        return total / count

    def token_nll(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        estimator: str = "sampled",
        num_samples: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Noise | None = None,
    ) -> TokenNLL:
        """The negative log-likelihood of every token in nats, exact; the first token of a text is not scored.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, zeros for padding on either side.
            labels: `(batch, length)`; -100 marks context, which is not scored. Default: score everything.
            estimator, num_samples, generator, noise: of the diffusion models; an autoregressive one needs no estimate.

        Raises:
            ValueError: ids outside the vocabulary, mask tokens in the text.
        """
        labels = input_ids if labels is None else labels
        predicted = self._predicted(input_ids, labels, attention_mask)
        nll = torch.zeros(input_ids.shape, device=input_ids.device)
        with torch.no_grad():
            hidden, targets = self._before(predicted, input_ids, labels, attention_mask)
            nll[predicted] = cross_entropy(hidden, self.get_output_embeddings(), targets, self.config.mask_token_id)
        return TokenNLL(nll, predicted.float())

    def _predicted(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The labelled tokens that have a token before them, bool `(batch, length)`."""
        check_text(self, input_ids, labels)
        predicted = labels != -100
        predicted[:, 0] = False
        if attention_mask is not None:
            real = attention_mask.bool()
            predicted &= real
            predicted[:, 1:] &= real[:, :-1]
        return predicted

    def _before(
        self,
        predicted: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of the positions before the predicted tokens, `(rows, hidden_dim)`, and these tokens."""
        length, device = input_ids.shape[1], input_ids.device
        layout = token_layout(attention_mask, length, 1, device=device)
        embeds = self.backbone.vocab_embed(input_ids)
        plan = block_causal_plan(
            layout, length, 1, implementation=self.config._attn_implementation, dtype=embeds.dtype
        )
        rows = predicted.flatten().nonzero().squeeze(1) - 1
        modulations = self.backbone.modulations(None, device)
        outputs = self.backbone.run(embeds, layout.position_ids, plan, modulations, rows=rows)
        return cast(torch.Tensor, outputs.last_hidden_state), labels[predicted]


register_auto_classes(ARForCausalLM, "AutoModelForCausalLM")

__all__ = ["ARForCausalLM", "ARModel"]
