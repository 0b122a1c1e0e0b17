"""The block-diffusion mixin for any network, and BD3-LM (arXiv 2503.09573) with the published weight names."""

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.utils import can_return_tuple

from .backbone_bd3lm import BD3LMLanguageModel, BD3LMModel, BD3LMOutput, logits_output
from .cache_bd3lm import release_buffers
from .compatibility_bd3lm import OwnLossMixin, check_not_next_token_training, register_auto_classes
from .configuration_bd3lm import BD3LMConfig
from .generation_bd3lm import BD3LMGenerationMixin
from .generation_config_bd3lm import BD3LMGenerationConfig
from .inputs_bd3lm import check_arguments, check_loss_arguments, default_labels, find_documents, generators_of_texts
from .layers_bd3lm import release_prepacked
from .likelihood_bd3lm import LikelihoodMixin
from .loss_bd3lm import denoising_loss
from .noise_bd3lm import check_interval, noise_from_arguments


class BlockDiffusionMixin(OwnLossMixin, BD3LMGenerationMixin, LikelihoodMixin):
    """The objective, the likelihood and `generate` of block diffusion, for any network.

    A subclass provides the network: a `backbone` with the interface of [`BD3LMModel`], `noisy_hidden` and
    `clean_cache` for the two streams, a `config` with the fields of the diffusion process, and `logits_head` if its
    head is more than a linear layer.
    """

    generation_config_class = BD3LMGenerationConfig
    accepts_loss_kwargs = True
    sampling_eps_min: torch.Tensor
    sampling_eps_max: torch.Tensor
    # The interval as last read, and the buffers it was read from, with their versions. It is kept as a string because
    # torch.compile treats a string as a constant; floats that change would become symbols, which cannot decide shapes.
    _interval_text: str = ""
    _interval_source: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None

    def train(self, mode: bool = True) -> Any:
        if mode:
            release_prepacked(self)  # copies of weights that are about to change
            release_buffers(self)
            self._read_interval()
        return super().train(mode)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        clean_input_ids: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        block_noise: torch.Tensor | None = None,
        token_noise: torch.Tensor | None = None,
        count_noise: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> BD3LMOutput:
        """Return the loss, the logits of the noisy stream, or block-causal logits, depending on the arguments.

        Args:
            input_ids: `(batch, length)`. With `labels`, the clean text x_0. With `clean_input_ids`, the noisy x_t.
                Otherwise, text with mask tokens to predict, each block conditioned on itself and the blocks before it.
            attention_mask: `(batch, length)`, ones for tokens and zeros for padding on either side; with a cache
                `(batch, cached + length)`. Blocks are counted from each row's first token.
            labels: `(batch, length)`. If given, the output is the loss: the paper's training objective in train mode
                (noise levels from the learned interval), its bound on the negative log-likelihood in eval mode, both
                in nats per scored token. Tokens labelled -100 are context: never masked, never scored.
            clean_input_ids: `(batch, length)`, the clean text x_0 whose noisy version is `input_ids`.
            timesteps: noise levels sigma `(batch,)`; read only if `config.time_conditioning`.
            past_key_values: cache of finished blocks. `use_cache=True` appends the blocks of `input_ids` to it,
                `use_cache=False` only reads it.
            position_ids: `(batch or 1, length)`, for documents packed into one row, as by
                `DataCollatorWithFlattening`. Wherever a position is not its predecessor plus one, a new document
                begins, which has its own blocks and does not attend to the others.
            block_noise, token_noise, count_noise: the uniform numbers that determine the noise of the loss, see
                [`Noise`]. With `(batch, num_noise_samples, ...)` the loss is the mean over the samples. By default
                torch's global generator draws them, `config.noise_draws` samples in train mode.
            num_items_in_batch: tokens to divide the summed loss by, when a step spans several batches or processes.
                In eval mode without gradients, as in a Trainer's evaluation, the output then also has the `nll` and
                `mask` of every token, from `config.eval_noise_draws` noise samples that depend on the text alone.

        Raises:
            ValueError: if ids are outside the vocabulary, or if arguments are unknown or exclude one another.
        """
        check_arguments(self, kwargs, position_ids)
        check_loss_arguments(
            labels,
            num_items_in_batch,
            input_ids,
            inputs_embeds=inputs_embeds,
            clean_input_ids=clean_input_ids,
            timesteps=timesteps,
            past_key_values=past_key_values,
        )
        self.config.check_block_size()
        if labels is not None:
            assert input_ids is not None  # checked
            # A Trainer evaluates without gradients, passes `num_items_in_batch` and cannot pass a generator.
            evaluates = not (self.training or torch.is_grad_enabled()) and num_items_in_batch is not None
            if evaluates and block_noise is None and token_noise is None:
                return self._scored_output(input_ids, labels, attention_mask, num_items_in_batch, position_ids)
            layout = {} if position_ids is None else {"position_ids": position_ids}
            if self.config.time_conditioning:
                # A row has a single noise level, so each packed document becomes its own row.
                documents, layout = find_documents(position_ids, attention_mask, input_ids.shape), {}
                if documents is not None:
                    input_ids, labels, attention_mask = documents.split(input_ids, labels)
            noise = noise_from_arguments(block_noise, token_noise, count_noise, input_ids.shape, self.config)
            batch = (input_ids, labels, attention_mask, noise, num_items_in_batch)
            return BD3LMOutput(loss=self.objective(*batch, **layout))
        if clean_input_ids is None and past_key_values is None:
            check_not_next_token_training(self, input_ids, self.config, in_trainer=True)
        return logits_output(
            self,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            clean_input_ids=clean_input_ids,
            timesteps=timesteps,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
        )

    def _scored_output(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        count: Any,
        position_ids: torch.Tensor | None,
    ) -> BD3LMOutput:
        """Score a batch for a Trainer's evaluation: a text gets the same noise wherever it is in the dataset."""
        shape = input_ids.shape
        documents = find_documents(position_ids, attention_mask, shape)
        labels = default_labels(labels, attention_mask)
        if documents is not None:
            input_ids, labels, attention_mask = documents.split(input_ids, labels)
        generator = generators_of_texts(input_ids, labels)
        samples = self.config.eval_noise_draws
        # Stratifying masks mixes noise levels, which a time-conditioned network cannot take; SEDD stratifies levels.
        estimator = "sampled" if self.config.time_conditioning and "exact" in self.estimators else "stratified"
        nll, mask = self.token_nll(
            input_ids, attention_mask, labels=labels, estimator=estimator, num_samples=samples, generator=generator
        )
        nll = nll.masked_fill(~mask.bool(), 0.0)
        # The Trainer counts labels, including those of first tokens, which `ignore_bos` leaves unscored.
        labelled, scored = (labels != -100).sum(), mask.sum()
        loss = nll.sum() / count * labelled / scored.clamp(min=1)
        if documents is not None:
            nll, mask = documents.join(nll, shape), documents.join(mask, shape)
        return BD3LMOutput(loss=loss, nll=nll, mask=mask.long())

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Any:
        # Casting the model moves the interval but must not round it: 0.45 would be 0.4492 in bfloat16.
        interval = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in interval.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def objective(self, *batch: Any, **layout: Any) -> torch.Tensor:
        """Return the loss of a batch; see [`denoising_loss`] in `loss_bd3lm.py`."""
        return denoising_loss(self, *batch, interval=self.interval(), **layout)

    @property
    def carries_interval(self) -> bool:
        """Whether the weights include an interval of noise levels."""
        return self.config.var_min

    @property
    def num_noise_samples(self) -> int:
        """Number of noise samples per training sequence."""
        return self.config.noise_draws

    def interval(self) -> tuple[float, float]:
        """Return the interval from which training draws noise levels.

        Compiled code sees the value that `train`, `set_interval` or an eager call of this method last read.
        """
        if not torch.compiler.is_compiling():
            self._read_interval()
        low, high = self._interval_text.split()
        return float(low), float(high)

    def _read_interval(self) -> None:
        """Read the interval from the weights, or from the config if the weights have none.

        Reading a number from a GPU synchronises, and training asks at every step, so it is read only after a change.
        """
        if not self.config.var_min or self.sampling_eps_min.is_meta:
            self._interval_text = f"{float(self.config.sampling_eps_min)} {float(self.config.sampling_eps_max)}"
            return
        low, high = self.sampling_eps_min, self.sampling_eps_max
        versioned = not (low.is_inference() or high.is_inference())  # inference tensors have no version counter
        source = (low, high, [low._version, high._version]) if versioned else None
        known = self._interval_source
        if known is None or source is None or known[0] is not low or known[1] is not high or known[2] != source[2]:
            self._interval_text, self._interval_source = f"{float(low)} {float(high)}", source

    def set_interval(self, low: float, high: float) -> None:
        """Set the interval [low, high] from which training draws noise levels, in the weights and in the config.

        Raises:
            ValueError: if it is not an interval within [0, 1], or with `config.resample` contains no k / block_size.
        """
        check_interval(low, high, self.config.block_size, truncated=self.config.resample)
        self.config.sampling_eps_min, self.config.sampling_eps_max = low, high
        if self.config.var_min:
            self.sampling_eps_min.fill_(low)
            self.sampling_eps_max.fill_(high)
        self._read_interval()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the interval of the weights in `config.json`."""
        if self.carries_interval:
            # Seven digits, so 0.95 is not written as its float32, 0.949999988.
            low, high = (float(f"{end:.7g}") for end in self.interval())
            self.config.sampling_eps_min, self.config.sampling_eps_max = low, high
        if getattr(self, "hf_quantizer", None) is None:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        # torchao cannot load a tensor that belongs to no layer, so here only `config.json` has the interval.
        hook = self.register_state_dict_post_hook(_drop_interval)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            hook.remove()


def _drop_interval(_model: Any, weights: dict[str, torch.Tensor], prefix: str, _metadata: Any) -> None:
    for name in ("sampling_eps_min", "sampling_eps_max"):
        weights.pop(prefix + name, None)


class BD3LMForMaskedLM(BlockDiffusionMixin, BD3LMLanguageModel, GenerationMixin):
    """Block-diffusion language model: scores text with `token_nll`, generates, and computes the paper's loss.

    ```python
    >>> logits = model(input_ids).logits                                # block-causal denoising logits
    >>> logits = model(input_ids=x_t, clean_input_ids=x_0).logits       # noisy stream given the clean one
    >>> loss = model(input_ids=x_0, labels=x_0).loss                    # training objective; NELBO in eval mode
    ```
    """

    _keep_in_fp32_modules_strict = ["sampling_eps_min", "sampling_eps_max", "inv_freq"]

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config)
        if config.causal:
            raise ValueError(
                "causal=True is an autoregressive model: use ARForCausalLM with an ARConfig (`bd3lm convert` makes "
                "one from a published checkpoint), or set causal=False for block diffusion."
            )
        if config.var_min:
            self.register_buffer("sampling_eps_min", torch.tensor(float(config.sampling_eps_min)))
            self.register_buffer("sampling_eps_max", torch.tensor(float(config.sampling_eps_max)))
        # The loss is not shifted, so Trainer must count all labels, not labels[1:].
        self.loss_type = None  # type: ignore[assignment]
        self.post_init()


register_auto_classes(BD3LMForMaskedLM, "AutoModelForMaskedLM", "AutoModelForCausalLM", backbone=BD3LMModel)
