"""The autoregressive baseline of BD3-LM (arXiv 2503.09573, Sec. 6): the same layers, causal and without adaLN.

log p(x) = sum over i of log p(x_i | x_<i), conditioned on the first token of a text. As published, the vocabulary
keeps the mask token, which has probability zero.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.utils import can_return_tuple

from .attention_bd3lm import block_causal_plan
from .backbone_bd3lm import BD3LMLanguageModel, BD3LMModel, BD3LMOutput, logits_output
from .cache_bd3lm import check_continued, clear, drop_oldest
from .compatibility_bd3lm import OwnLossMixin, register_auto_classes
from .configuration_bd3lm import ARConfig
from .decoding_bd3lm import BD3LMGenerateOutput
from .generation_bd3lm import BD3LMGenerationMixin
from .generation_config_bd3lm import BD3LMGenerationConfig
from .inputs_bd3lm import (
    Layout,
    check_arguments,
    check_loss_arguments,
    check_positions,
    check_text,
    may_read,
    token_layout,
)
from .likelihood_bd3lm import LikelihoodMixin, ScoringRequest, TokenNLL
from .logits_process_bd3lm import never_generated
from .loss_bd3lm import chunked_cross_entropy, cross_entropy, divide_by_count
from .samplers_bd3lm import Generators
from .windows_bd3lm import WINDOWS


class ARModel(BD3LMModel):
    """The backbone with causal attention."""

    config_class = ARConfig


class ARForCausalLM(OwnLossMixin, BD3LMGenerationMixin, LikelihoodMixin, BD3LMLanguageModel):
    """Autoregressive language model: `token_nll` gives exact likelihoods, `generate` uses an exact cache.

    Texts longer than `model_length` continue in a window that slides by one token. `window="cached"` keeps the keys
    and values of its tokens: one token per pass, though those of deeper layers still contain information from tokens
    that have left the window. With `window="exact"`, as published, or without a cache, each pass reads the whole
    window again.
    """

    config_class = ARConfig
    backbone_class = ARModel
    generation_config_class = BD3LMGenerationConfig
    accepts_loss_kwargs = True
    carries_interval = False
    num_noise_samples = 1
    generator_per_row = False  # transformers' own loop samples all rows together

    def __init__(self, config: ARConfig) -> None:
        super().__init__(config)
        self.post_init()

    # --- Generation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> BD3LMGenerateOutput | torch.Tensor:
        """Generate token by token with transformers' own loop; rows can be padded on either side."""
        _refuse_denoising(generation_config)
        prompts, home = self._take_prompts(input_ids, model_kwargs, synced_gpus), input_ids.device
        prompt, padding = prompts.left, prompts.padding
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            check_continued(cache, prompt, prompt.shape[1], self.config, num_uncached=1)
        model_kwargs["attention_mask"] = prompts.attention_mask if padding is None else (~padding).long()
        model_kwargs.pop("position_ids", None)  # they were made before the padding moved
        model_kwargs.pop("tokenizer", None)  # for stop_strings, whose criterion has it already
        # A prompt longer than the window is read again for each token, since no cache has slid over it.
        exact = WINDOWS[generation_config.window] or prompt.shape[1] > self.config.model_length
        criteria = _CountingCriteria(stopping_criteria)
        with _seeded(model_kwargs.pop("generator", None), self.device):
            result = GenerationMixin._sample(
                self,
                prompt,  # type: ignore[arg-type]
                logits_processor,
                criteria,
                generation_config,
                streamer=streamer,
                exact_window=exact,
                **model_kwargs,
            )
        width = prompt.shape[1]
        generated = result if isinstance(result, torch.Tensor) else result.sequences
        num_new = generated.shape[1] - width
        sequences = torch.cat([prompts.input_ids, generated[:, width:]], dim=1).to(home)
        if isinstance(result, torch.Tensor):
            return sequences
        # A cache over which the window has slid lacks the oldest tokens, so a later call must not continue from it.
        cache = result.past_key_values
        if cache is not None and generated.shape[1] > self.config.model_length:
            clear(cache)
        return BD3LMGenerateOutput(
            sequences=sequences,
            scores=result.scores,
            logits=result.logits,
            past_key_values=cache,
            num_forward_passes=num_new,
            tokens_per_forward=criteria.tokens_per_row / max(1, num_new),
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, generator: Generators = None, exact_window: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare inputs as transformers does, but only the last `model_length` tokens of a longer text."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        past_key_values, attention_mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        window = self.config.model_length
        if input_ids.shape[1] <= window:
            return inputs
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask[:, -window:]
        if past_key_values is None or exact_window:
            if past_key_values is not None:
                clear(past_key_values)
            changes = {"input_ids": input_ids[:, -window:], "past_key_values": None, "use_cache": False}
            return {**inputs, **changes, "position_ids": None}
        length = inputs["input_ids"].shape[1]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        drop_oldest(past_key_values, max(0, int(past_key_values.get_seq_length()) + length - window))
        # The cached keys were rotated at the positions of their tokens in the whole text.
        return {**inputs, "position_ids": (real.long().cumsum(1) - 1).clamp(min=0)[:, -length:]}

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        name = generation_config.cache_implementation
        if name not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={name!r} is not supported by the autoregressive models of this library, whose "
                f"cache grows with the text until the window is full. Leave it out."
            )
        super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    @property
    def infill(self) -> Any:
        # The state at a mask token predicts the token after it: infilling as block diffusion does would be wrong.
        raise AttributeError(f"{type(self).__name__} has no infill: it generates from left to right only.")

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        # First, so that no other processor sees them: the mask token has probability zero, and padding is not text.
        forbidden = never_generated(self.config.mask_token_id, generation_config)
        processors.insert(0, SuppressTokensLogitsProcessor(forbidden, device=str(self.device)))
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
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> BD3LMOutput:
        """Return raw next-token logits `(batch, length, vocab_size)`, or the loss.

        Args:
            input_ids: `(batch, length)`; with a cache, the tokens after the cached ones.
            attention_mask: `(batch, cached + length)`, zeros for padding on either side.
            labels: `(batch, length)`, the text itself, not shifted; -100 marks context. The loss is the mean negative
                log-likelihood in nats of the labelled tokens that have a token before them.
            position_ids: `(batch or 1, length)`; where they restart at 0, a new document begins, which does not see
                the others. By default counted from each row's first token.
            logits_to_keep: number of last positions, or tensor of positions, whose logits are returned; 0 for all.
            num_items_in_batch: tokens to divide the summed loss by, when a step spans several batches or processes.

        Raises:
            ValueError: if ids are outside the vocabulary, or labels are passed without input_ids.
        """
        check_arguments(self, kwargs, position_ids)
        check_loss_arguments(
            labels, num_items_in_batch, input_ids, inputs_embeds=inputs_embeds, past_key_values=past_key_values
        )
        self.config.check_block_size()
        if labels is not None:
            assert input_ids is not None  # checked
            check_positions(position_ids, input_ids.shape)
            check_text(self.config, input_ids, labels, attention_mask)
            layout, predicted = self._predicted(input_ids, labels, attention_mask, position_ids)
            if not (self.training or torch.is_grad_enabled()) and num_items_in_batch is not None:
                # A Trainer's evaluation, which passes the other outputs to `predict` and `compute_metrics`.
                nll, mask = self._score(input_ids, labels, layout, predicted)
                loss = divide_by_count(nll.sum(), mask.bool(), num_items_in_batch)
                return BD3LMOutput(loss=loss, nll=nll, mask=mask.long())
            total = self._loss(input_ids, labels, layout, predicted)
            return BD3LMOutput(loss=divide_by_count(total, predicted, num_items_in_batch))
        # slice(0, None) for 0: all positions, as in transformers.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return logits_output(
            self,
            kwargs,
            kept,
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
        )

    def _loss(
        self, input_ids: torch.Tensor, labels: torch.Tensor, layout: Layout, predicted: torch.Tensor
    ) -> torch.Tensor:
        """Return the summed negative log-likelihood of the predicted tokens, with a gradient."""
        if may_read(predicted.device):
            indices = predicted.flatten().nonzero().squeeze(1)
        else:  # all tokens but the first of each row, weighted by whether they are predicted
            indices = torch.arange(predicted.numel(), device=predicted.device).view_as(predicted)[:, 1:].flatten()
        hidden = self._hidden_before(indices, input_ids, layout)
        weights, targets = predicted.flatten()[indices].float(), labels.flatten()[indices].clamp(min=0)
        return chunked_cross_entropy(hidden, self.logits_head(), targets, weights, self.config)

    def _token_nll(self, request: ScoringRequest) -> TokenNLL:
        layout, predicted = self._predicted(request.input_ids, request.labels, request.attention_mask)
        return self._score(request.input_ids, request.labels, layout, predicted)

    def _score(
        self, input_ids: torch.Tensor, labels: torch.Tensor, layout: Layout, predicted: torch.Tensor
    ) -> TokenNLL:
        nll = torch.zeros(input_ids.shape, device=input_ids.device)
        indices = predicted.flatten().nonzero().squeeze(1)
        hidden = self._hidden_before(indices, input_ids, layout)
        nll[predicted] = cross_entropy(hidden, self.logits_head(), labels[predicted], self.config)
        return TokenNLL(nll, predicted.float())

    def _predicted(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[Layout, torch.Tensor]:
        """Return the layout, and which labelled tokens follow a token of their document, bool `(batch, length)`."""
        # Causal attention is block-causal attention over blocks of one token.
        length, device = input_ids.shape[1], input_ids.device
        layout = token_layout(attention_mask, length, 1, device=device, position_ids=position_ids)
        predicted = labels != -100
        # The first token has no predecessor, and neither has the first one after padding.
        predicted[:, 0] = False
        if layout.valid is not None:
            predicted &= layout.valid
            predicted[:, 1:] &= layout.valid[:, :-1]
        if layout.document_ids is not None:
            predicted[:, 1:] &= layout.document_ids[:, 1:] == layout.document_ids[:, :-1]
        return layout, predicted

    def _hidden_before(self, indices: torch.Tensor, input_ids: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return the hidden states of the positions before flat indices, `(indices, hidden_dim)`."""
        embeds = self.backbone.vocab_embed(input_ids)
        plan = block_causal_plan(layout, input_ids.shape[1], self.config, embeds.dtype)
        modulations = self.backbone.modulations(None, input_ids.device)
        # The hidden state before a token predicts it. No index is that of a row's first token, so `- 1` is safe.
        outputs = self.backbone.run(embeds, layout.position_ids, plan, modulations, output_indices=indices - 1)
        return cast(torch.Tensor, outputs.last_hidden_state)


class _CountingCriteria(StoppingCriteriaList):
    """Stopping criteria that also count the tokens of rows that have not ended."""

    _running: Any = True  # then bool (batch,)
    _tokens: Any = 0  # then a scalar tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = cast(torch.Tensor, super().__call__(input_ids, scores, **kwargs))
        running = torch.ones_like(done) & self._running
        self._tokens = self._tokens + running.sum()
        self._running = running & ~done
        return done

    @property
    def tokens_per_row(self) -> float:
        """Mean number of new tokens per row, without the padding of finished rows."""
        return float(self._tokens) / len(self._running)


def _refuse_denoising(generation_config: Any) -> None:
    """Refuse generation fields that only apply to denoising models."""
    given, plain = vars(generation_config), vars(BD3LMGenerationConfig())
    fields = ("sampler", "num_denoising_steps", "remask_fraction", "sampling_dtype", "window_stride", "output_trace")
    for name in fields:
        if given[name] != plain[name]:
            raise ValueError(
                f"{name}={given[name]!r} is for denoising models: an autoregressive model generates token by token. "
                f"Leave it out."
            )


@contextlib.contextmanager
def _seeded(generator: Generators, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, which transformers' loop uses, from `generator`; restore them afterwards."""
    if generator is None:
        yield
        return
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            "an autoregressive model samples all rows together and cannot use a generator per row: pass a single "
            "torch.Generator."
        )
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if device.type == "cpu":
        with torch.random.fork_rng([], device_type="cuda"):
            torch.default_generator.manual_seed(seed)
            yield
        return
    # `torch.manual_seed` would seed every device of the machine, but only this one is restored.
    module = torch.get_device_module(device)
    with torch.random.fork_rng([device], device_type=device.type), module.device(device):
        torch.default_generator.manual_seed(seed)
        module.manual_seed(seed)
        yield


register_auto_classes(ARForCausalLM, "AutoModelForCausalLM", backbone=ARModel)

__all__ = ["ARForCausalLM", "ARModel"]
