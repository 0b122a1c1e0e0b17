"""The backbone of BD3-LM and its masked language model (arXiv 2503.09573), with the published weight names."""

import os
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from .attention_bd3lm import AttentionPlan, block_causal_plan, token_layout, two_stream_plan
from .cache_bd3lm import BlockCache
from .configuration_bd3lm import BD3LMConfig
from .generation_bd3lm import BD3LMGenerationMixin
from .generation_config_bd3lm import BD3LMGenerationConfig
from .layers_bd3lm import (
    BD3LMBlock,
    BD3LMEmbedding,
    BD3LMFinalLayer,
    BD3LMRotaryEmbedding,
    Modulation,
    Pass,
    TimestepEmbedder,
)
from .likelihood_bd3lm import TokenNLL, token_nll
from .loss_bd3lm import check_token_ids, denoising_loss
from .noise_bd3lm import Noise, check_interval, given_noise
from .packed_bd3lm import UNPACKED, PackedLinears, release_packed
from .pretrained_bd3lm import BD3LMOutput, BD3LMPreTrainedModel, register_auto_classes
from .sharding_bd3lm import is_sharded


# Of every layer and the final norm: what adaLN makes it from, or folded into norms and gates.
Modulations = list[torch.Tensor | Modulation | tuple[torch.Tensor, torch.Tensor | None] | None]


class BD3LMModel(BD3LMPreTrainedModel):
    """The backbone: token ids to normed hidden states, ready for the head. It knows nothing of noise or losses."""

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config)
        self.vocab_embed: nn.Module = BD3LMEmbedding(config.vocab_size, config.hidden_dim)
        if config.adaln:
            self.sigma_map = TimestepEmbedder(config.cond_dim)
        self.rotary_emb = BD3LMRotaryEmbedding(config)
        self.blocks = nn.ModuleList(BD3LMBlock(config, i) for i in range(config.n_blocks))
        self.output_layer = BD3LMFinalLayer(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vocab_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vocab_embed = value

    def linears(self) -> list[nn.Module]:
        """The layers whose products make up the cost of a pass."""
        return [layer for block in self.blocks for layer in cast(BD3LMBlock, block).linears()]

    def modulations(self, timesteps: torch.Tensor | None, device: torch.device) -> Modulations:
        """What gives every layer and the final norm their shifts, scales and gates.

        In training the conditioning vector itself, of which each layer makes its own modulation when it is called:
        checkpointing recomputes it, and weights that are spread over processes are whole then. Otherwise each layer's
        modulation, folded once for a whole decode.

        Args:
            timesteps: noise levels sigma `(batch,)`, read only by time-conditioned models; the others, as published,
                feed a zero to the same weights, which gives one learned modulation for all inputs.
        """
        conditioning = None
        if self.config.adaln:
            if self.config.time_conditioning:
                if timesteps is None:
                    raise ValueError(
                        "this model has time_conditioning=True: pass timesteps, the noise levels sigma, one per "
                        "sequence."
                    )
                sigma = timesteps.reshape(-1)
            else:
                sigma = torch.zeros(1, device=device)
            conditioning = F.silu(self.sigma_map(sigma))
        layers = [*self.blocks, self.output_layer]
        if torch.is_grad_enabled() or any(map(is_sharded, layers)):
            return [conditioning] * len(layers)
        return [layer.fold(conditioning) for layer in layers]

    def run(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        plan: AttentionPlan,
        modulations: Modulations,
        *,
        past_key_values: Cache | None = None,
        commit: int = 0,
        rows: torch.Tensor | None = None,
        linears: PackedLinears = UNPACKED,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPast:
        """One pass over the streams `[x_0 ; x_t]`, or over either alone, as `plan` says.

        Args:
            inputs_embeds: `(batch, length, hidden_dim)` of all streams.
            position_ids: `(batch or 1, length)`.
            rows: flat indices into the positions that have an output, `(batch * (length - plan.skip),)` at most. Only
                these pass the last layer's MLP and come out.
            linears: calls the layers' products; by default each layer itself.

        Returns:
            `last_hidden_state` of `(batch, length - plan.skip, hidden_dim)`, or `(rows, hidden_dim)`. Recorded hidden
            states and attentions are those of the positions after `plan.skip`.
        """
        cos, sin = self.rotary_emb(position_ids, torch.float32)
        shared = Pass(plan, cos, sin, past_key_values, commit, rows, linears)
        hidden_states = inputs_embeds
        recorded: tuple[torch.Tensor, ...] = ()
        attentions: tuple[torch.Tensor, ...] = ()
        for index, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=False)):
            if output_hidden_states:
                # Without a stream to leave out, the tensor itself: a gradient reaches it, not a view of it.
                recorded += (hidden_states[:, plan.skip :] if plan.skip else hidden_states,)
            hidden_states, weights = block(hidden_states, modulation, shared, index == len(self.blocks) - 1)
            if output_attentions:
                attentions += (weights,)
        if output_hidden_states:
            recorded += (hidden_states,)
        row = None if rows is None else rows // (inputs_embeds.shape[1] - plan.skip)
        final = cast("torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | None", modulations[-1])
        return BaseModelOutputWithPast(
            last_hidden_state=self.output_layer.norm(hidden_states, final, row),
            past_key_values=past_key_values,
            hidden_states=recorded or None,
            attentions=attentions or None,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        clean_input_ids: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Normed hidden states `(batch, length, hidden_dim)`; arguments as in [`BD3LMForMaskedLM.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        check_token_ids(input_ids, self.config.vocab_size, "input_ids")
        check_token_ids(clean_input_ids, self.config.vocab_size, "clean_input_ids")
        embeds = self.vocab_embed(input_ids) if inputs_embeds is None else inputs_embeds
        length, device = embeds.shape[1], embeds.device
        past_key_values, commit, past = self._open_cache(past_key_values, use_cache, length, attention_mask)
        layout = token_layout(attention_mask, length, self.config.block_size, past=past, device=device)
        position_ids = layout.position_ids[:, past:] if position_ids is None else position_ids
        options = {"implementation": self.config._attn_implementation, "dtype": embeds.dtype}
        if clean_input_ids is not None and (past_key_values is not None or clean_input_ids.shape != embeds.shape[:2]):
            raise ValueError(
                f"clean_input_ids of shape {tuple(clean_input_ids.shape)} must have the shape of the noisy input, "
                f"{tuple(embeds.shape[:2])}, and no cache beside it: x_0 itself is the context."
            )
        if clean_input_ids is None or length <= self.config.block_size:
            plan = block_causal_plan(layout, length, self.config.block_size, **options)
        else:
            plan = two_stream_plan(layout, self.config.block_size, **options)
            embeds = torch.cat([self.vocab_embed(clean_input_ids), embeds], dim=1)
            position_ids = torch.cat([position_ids, position_ids], dim=1)
        return self.run(
            embeds,
            position_ids,
            plan,
            self.modulations(timesteps, device),
            past_key_values=past_key_values,
            commit=commit,
            output_hidden_states=bool(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
        )

    def _open_cache(
        self, cache: Cache | None, use_cache: bool | None, length: int, attention_mask: torch.Tensor | None
    ) -> tuple[Cache | None, int, int]:
        """The cache of this pass, how many positions to write to it, and how many it holds."""
        write = cache is not None if use_cache is None else use_cache
        if cache is None:
            cache = BlockCache() if write and not self.training else None
            write = cache is not None
        past = 0 if cache is None else int(cache.get_seq_length())
        if write:
            self._check_whole_blocks(past + length, attention_mask)
        return cache, length if write else 0, past

    def _check_whole_blocks(self, width: int, attention_mask: torch.Tensor | None) -> None:
        """Refuse to store a block that is not finished: its keys would never have seen the rest of it."""
        tokens = [width]
        if attention_mask is not None:
            if torch.compiler.is_compiling() or attention_mask.device.type != "cpu":
                return
            tokens = attention_mask.sum(1).tolist()
        size = self.config.block_size
        if any(count % size for count in tokens):
            raise ValueError(
                f"use_cache=True would store {tokens} tokens in all, no whole number of blocks of {size}: a block is "
                f"stored when it is finished, so pass whole blocks, or use_cache=False to read the cache only."
            )


class BD3LMLanguageModel(BD3LMPreTrainedModel):
    """A backbone with its head, which the models of this family share: BD3-LM and the baselines."""

    backbone_class: type[BD3LMModel] = BD3LMModel

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config)
        if config.model_type != self.config_class.model_type:
            raise ValueError(
                f"a {type(self).__name__} can not be made from a {type(config).__name__} "
                f"(model_type={config.model_type!r}): pass a {self.config_class.__name__}, or let "
                f"AutoModelForCausalLM.from_config choose the class."
            )
        self.backbone = self.backbone_class(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.vocab_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.vocab_embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.output_layer.linear

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.output_layer.linear = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the mask token keeps its id.

        Raises:
            ValueError: the new vocabulary would not hold the mask token.
        """
        if new_num_tokens is not None and new_num_tokens <= self.config.mask_token_id:
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) would drop mask_token_id={self.config.mask_token_id}: "
                f"keep at least {self.config.mask_token_id + 1} tokens."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


class BD3LMForMaskedLM(BD3LMGenerationMixin, BD3LMLanguageModel):
    """Block-diffusion language model: scores with `token_nll`, writes with `generate`, carries the paper's loss.

    ```python
    >>> logits = model(input_ids).logits                                # block-causal denoising logits
    >>> logits = model(input_ids=x_t, clean_input_ids=x_0).logits       # noisy stream given the clean one
    >>> loss = model(input_ids=x_0, labels=x_0).loss                    # training objective; NELBO in eval mode
    ```
    """

    generation_config_class = BD3LMGenerationConfig
    accepts_loss_kwargs = True
    _keep_in_fp32_modules_strict = ["sampling_eps_min", "sampling_eps_max", "inv_freq"]
    sampling_eps_min: torch.Tensor
    sampling_eps_max: torch.Tensor

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config)
        if config.causal:
            raise ValueError(
                "causal=True is an autoregressive model: its class is ARForCausalLM with an ARConfig, which `bd3lm "
                "convert` makes of a published checkpoint. For block diffusion set causal=False."
            )
        if config.var_min:
            self.register_buffer("sampling_eps_min", torch.tensor(float(config.sampling_eps_min)))
            self.register_buffer("sampling_eps_max", torch.tensor(float(config.sampling_eps_max)))
        self._adopt_special_tokens()
        # The loss is not shifted, so Trainer must count all labels, not labels[1:].
        self.loss_type = None  # type: ignore[assignment]
        self.post_init()

    def train(self, mode: bool = True) -> "BD3LMForMaskedLM":
        if mode:
            release_packed(self)  # copies of weights that are about to change
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
        block_noise: torch.Tensor | None = None,
        token_noise: torch.Tensor | None = None,
        count_noise: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> BD3LMOutput:
        """One of three passes, by what is given: the loss, the noisy stream's logits, or block-causal logits.

        Args:
            input_ids: `(batch, length)`. With `labels`, the clean text x_0. With `clean_input_ids`, the noisy x_t.
                Alone, a text whose blocks are seen from left to right, mask tokens to be predicted.
            attention_mask: `(batch, length)`, ones for tokens and zeros for padding on either side; with a cache
                `(batch, cached + length)`. Blocks are counted from each row's first token.
            labels: `(batch, length)`. Gives the loss: the paper's training objective in train mode (noise levels from
                the learned interval), its bound on the negative log-likelihood in eval mode, both in nats per scored
                token. Where labels are -100 a token is context: never masked, never scored.
            clean_input_ids: `(batch, length)`, the clean text that x_t was made of.
            timesteps: noise levels sigma `(batch,)`; read only if `config.time_conditioning`.
            past_key_values: cache of finished blocks. `use_cache=True` writes the given blocks to it,
                `use_cache=False` only reads it.
            block_noise, token_noise, count_noise: the uniform draws that decide the noise of the loss, see
                [`Noise`]; with `(batch, draws, ...)` the loss is the mean over the draws. Without them they are drawn
                from torch's global generator, `config.noise_draws` of them in train mode.
            num_items_in_batch: tokens to divide the summed loss by, when a step spans several batches or processes.

        Raises:
            ValueError: ids outside the vocabulary, or arguments that exclude one another.
        """
        if labels is not None:
            if input_ids is None:
                raise ValueError(
                    "labels need input_ids: the loss masks tokens, so it cannot start from inputs_embeds."
                )
            noise = given_noise(block_noise, token_noise, count_noise, input_ids.shape, self.config)
            return BD3LMOutput(loss=self.objective(input_ids, labels, attention_mask, noise, num_items_in_batch))
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            clean_input_ids=clean_input_ids,
            timesteps=timesteps,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **{k: kwargs[k] for k in ("output_hidden_states", "output_attentions") if k in kwargs},
        )
        return BD3LMOutput(
            logits=self.backbone.output_layer(outputs.last_hidden_state),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

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
        """Bound on the negative log-likelihood of every token; see [`token_nll`] in `likelihood_bd3lm.py`."""
        return token_nll(
            self,
            input_ids,
            attention_mask,
            labels=labels,
            estimator=estimator,
            num_samples=num_samples,
            generator=generator,
            noise=noise,
        )

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> "BD3LMForMaskedLM":
        # A cast of the whole model moves the interval but does not round it: 1e-3 in bfloat16 is another number, and
        # the whole interval would count as a clipped one.
        interval = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in interval.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def objective(self, *batch: Any) -> torch.Tensor:
        """The loss of a batch; see [`denoising_loss`] in `loss_bd3lm.py`."""
        return denoising_loss(self, *batch)

    @property
    def exact_likelihood(self) -> bool:
        """Whether `token_nll` is the likelihood itself and not a bound."""
        return self.config.block_size == 1

    def interval(self) -> tuple[float, float]:
        """The interval of noise levels that training draws from."""
        if self.config.var_min:
            return float(self.sampling_eps_min), float(self.sampling_eps_max)
        return float(self.config.sampling_eps_min), float(self.config.sampling_eps_max)

    def set_interval(self, low: float, high: float) -> None:
        """Draw the noise levels of training from [low, high] from now on; saved with the weights and the config.

        Raises:
            ValueError: no interval inside [0, 1], or, with `config.resample`, one that no mask rate of a block meets.
        """
        check_interval(low, high, self.config.block_size, confined=self.config.resample)
        self.config.sampling_eps_min, self.config.sampling_eps_max = low, high
        if self.config.var_min:
            self.sampling_eps_min.fill_(low)
            self.sampling_eps_max.fill_(high)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; `config.json` says the interval that the weights carry, which loading may have set."""
        ends = torch.tensor([self.config.sampling_eps_min, self.config.sampling_eps_max])
        if not torch.equal(ends, torch.tensor(self.interval())):
            self.config.sampling_eps_min, self.config.sampling_eps_max = self.interval()
        super().save_pretrained(save_directory, *args, **kwargs)


register_auto_classes(BD3LMForMaskedLM, "AutoModelForMaskedLM", "AutoModelForCausalLM")

__all__ = ["BD3LMForMaskedLM", "BD3LMLanguageModel", "BD3LMModel"]
