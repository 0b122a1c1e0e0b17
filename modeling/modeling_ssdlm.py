"""SSD-LM (arXiv 2210.17432): a masked-LM encoder that denoises the next block on the vocabulary simplex.

The encoder sees the word embeddings of the context, then those of the noisy block: W softmax(x_t) + v (t / T), with
linear layers W of the vocabulary and v of the progress. It is trained with the cross-entropy of the block's tokens at
a random noise level (Eq. 7). Its likelihood is not tractable.
"""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForMaskedLM
from transformers import initialization as init
from transformers.generation.logits_process import LogitsProcessorList
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .compatibility_bd3lm import OwnLossMixin, SelfContainedMixin, register_auto_classes
from .configuration_ssdlm import SSDLMConfig
from .decoding_state_bd3lm import SequenceBuffer
from .generation_bd3lm import BlockGenerationMixin, Prompts
from .generation_ssdlm import (
    SimplexWriter,
    SSDLMGenerationConfig,
    almost_one_hot,
    noisy_logits,
    simplex_alpha_bar,
)
from .inputs_bd3lm import (
    check_arguments,
    check_attention_mask,
    check_labels,
    check_loss_arguments,
    default_labels,
    generators_of_texts,
)


@dataclass
class SSDLMOutput(ModelOutput):
    """Output of [`SSDLMForMaskedLM`].

    Args:
        loss: scalar, nats per token, when `labels` are given.
        logits: `(batch, block, vocab_size)`, of the block's clean tokens.
        nll, mask: `(batch, length)`, in a Trainer's evaluation: cross-entropy of the tokens of the denoised block, and
            ones where these are.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class TimestepLayer(nn.Module):
    """A linear layer of one number, the progress t / T. Not an `nn.Linear`: quantizers cannot pack a single column."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(hidden_dim, 1)), nn.Parameter(torch.empty(hidden_dim))

    def forward(self, progress: torch.Tensor) -> torch.Tensor:
        """Return the embeddings `(..., hidden_dim)` of progress `(..., 1)`."""
        return F.linear(progress, self.weight, self.bias)


class SSDLMForMaskedLM(OwnLossMixin, BlockGenerationMixin, SelfContainedMixin, PreTrainedModel):
    """Semi-autoregressive simplex diffusion over any masked-LM encoder of transformers.

    As published, `generate` can write any token, special tokens included; list the unwanted ones in `suppress_tokens`.

    ```python
    >>> loss = model(input_ids=ids, labels=ids).loss
    >>> text = model.generate(prompt, max_new_tokens=50, num_denoising_steps=100, projection="even")
    ```
    """

    config_class = SSDLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    generation_config_class = SSDLMGenerationConfig
    masks_text = False
    accepts_loss_kwargs = True
    has_likelihood = False  # its loss does not bound the likelihood
    exact_likelihood = False
    carries_interval = False
    num_noise_samples = 1
    # Low-rank adapters: attention and MLP of every layer of a RoBERTa or BERT encoder.
    lora_targets = ("query", "key", "value", "intermediate.dense", "output.dense")
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: SSDLMConfig) -> None:
        super().__init__(config)
        self.model = AutoModelForMaskedLM.from_config(config.encoder_config)
        self.embed_sum = nn.Linear(config.vocab_size, config.hidden_dim, bias=False)
        self.timestep = TimestepLayer(config.hidden_dim)
        # transformers cannot split the head between devices, since its bias is tied.
        output = self.get_output_embeddings()
        self._no_split_modules = [type(part).__name__ for part in self.model.children() if output in part.modules()]
        self.loss_type = None  # type: ignore[assignment]  # nothing is shifted
        self.post_init()

    @classmethod
    def from_encoder(cls, encoder: PreTrainedModel, **fields: Any) -> "SSDLMForMaskedLM":
        """Make a model around the weights of a trained masked language model, such as RoBERTa.

        The simplex layer starts as the encoder's word embeddings, the timestep layer is new.

        Args:
            encoder: a masked language model of transformers; its weights are copied.
            fields: fields of the configuration other than `encoder_config`.

        Raises:
            ValueError: if the fields do not fit the encoder.
        """
        model = cls(cls.config_class(encoder_config=copy.deepcopy(encoder.config), **fields))
        model.model.load_state_dict(encoder.state_dict())
        model.embed_sum.weight.data.copy_(cast(nn.Embedding, model.get_input_embeddings()).weight.data.T)
        return model

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Seeded inputs of a forward pass without a loss, on the CPU."""
        config, generator = self.config, torch.Generator().manual_seed(0)
        length = config.model_length - config.block_size
        return {
            "input_ids": torch.randint(0, config.vocab_size, (2, length), generator=generator),
            "noisy_logits": torch.randn((2, config.block_size, config.vocab_size), generator=generator),
            "timesteps": torch.tensor([0.1, 1.0]),
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the layers around the encoder: the simplex layer mixes word embeddings."""
        if module is self.embed_sum:
            init.copy_(module.weight, cast(nn.Embedding, self.get_input_embeddings()).weight.T)
        elif module is self.timestep:
            init.normal_(module.weight, std=0.02)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as transformers does; new tokens of the simplex layer start as their word embeddings.

        Raises:
            ValueError: if the new vocabulary would not include the mask token.
        """
        config = self.config
        self._check_keeps_mask_token(new_num_tokens)
        words = self.model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        # transformers resizes only the encoder, but the simplex layer also has a column per token.
        old, size = self.embed_sum.weight.data, words.num_embeddings
        if size != config.vocab_size:
            weight = words.weight.data.T.to(old, copy=True)
            weight[:, : old.shape[1]] = old[:, :size]
            self.embed_sum = nn.Linear(size, config.hidden_dim, bias=False, device=old.device, dtype=old.dtype)
            self.embed_sum.weight.data = weight
            config.vocab_size = config.encoder_config.vocab_size = size
        return words

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        # The encoder attends from the context to the noisy block, so nothing can be cached.
        if (name := generation_config.cache_implementation) is not None:
            raise ValueError(f"cache_implementation={name!r}: an SSD-LM has no cache. Leave it out.")

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        # The projection applies the nucleus.
        top_p, generation_config.top_p = generation_config.top_p, 1.0
        try:
            return super()._get_logits_processor(generation_config, *args, **kwargs)
        finally:
            generation_config.top_p = top_p

    def open_writer(
        self, prompts: Prompts, processors: LogitsProcessorList, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> SimplexWriter:
        self._check_fits_window(prompts.attention_mask)
        prompt, padding = prompts.left, prompts.padding
        # The prompts end at the same column, where the first block begins.
        (batch, width), size = prompt.shape, self.config.block_size
        max_new_tokens = generation_config.max_length - width
        columns = -(-max_new_tokens // size) * size
        text = F.pad(prompt, (0, columns), value=self.config.mask_token_id)
        start = prompt.new_zeros(batch) if padding is None else padding.sum(1)
        valid = None if padding is None else F.pad(~padding, (0, columns), value=True)
        buffer = SequenceBuffer(text, start, width - start, width, max_new_tokens, size, valid)
        return SimplexWriter(self, buffer, prompt, processors, generation_config, model_kwargs.get("generator"))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        noisy_logits: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        block_noise: torch.Tensor | None = None,
        token_noise: torch.Tensor | None = None,
        count_noise: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> SSDLMOutput:
        """Return the logits of a noisy block after its context, or the training loss.

        Args:
            input_ids: `(batch, length)`: the context, or with `labels` the whole training text.
            attention_mask: `(batch, length)`, zeros for padding on either side.
            labels: `(batch, length)`. If given, the output is the loss of one random block per text, denoised given
                the tokens before it. Tokens labelled -100 are context only.
            noisy_logits: `(batch, block, vocab_size)`, the block's x_t.
            timesteps: `(batch,)`, the progress t / T of the block.
            block_noise, count_noise: `(batch, 2)` uniform numbers that determine the step t and the length of the
                context, and the seed of the Gaussian noise; by default torch's global generator draws them.
            token_noise: unused.
            num_items_in_batch: labelled tokens of all batches of a step. In eval mode without gradients, as in a
                Trainer's evaluation, the noise then depends on the text alone.

        Raises:
            ValueError: if neither a block nor labels are given, or if a text is too short for a context and a block.
        """
        check_arguments(self, kwargs)
        check_loss_arguments(labels, num_items_in_batch, input_ids, noisy_logits=noisy_logits, timesteps=timesteps)
        self.config.check_block_size()
        if input_ids is None:
            raise ValueError("input_ids are missing: pass the context of the block, or a text with labels.")
        check_attention_mask(attention_mask, input_ids.shape)
        if labels is not None:
            check_labels(self.config, input_ids, labels, attention_mask)
            noise = (block_noise, count_noise)
            evaluates = not (self.training or torch.is_grad_enabled()) and num_items_in_batch is not None
            if evaluates and block_noise is None:
                sources = generators_of_texts(input_ids, default_labels(labels, attention_mask))
                uniform = torch.stack([torch.rand(4, generator=source) for source in sources])
                noise = (uniform[:, :2], uniform[:, 2:])
            loss, nll, mask = self._loss(input_ids, attention_mask, labels, noise, num_items_in_batch)
            return SSDLMOutput(loss=loss, nll=nll, mask=mask) if evaluates else SSDLMOutput(loss=loss)
        if noisy_logits is None or timesteps is None:
            raise ValueError(
                "a context alone has no logits: pass noisy_logits and timesteps of the block after it, or labels for "
                "the loss."
            )
        return SSDLMOutput(logits=self.denoise(input_ids, attention_mask, noisy_logits, timesteps))

    def denoise(
        self,
        context_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Return logits `(batch, block, vocab_size)`; arguments as in [`forward`]."""
        batch, width = context_ids.shape
        block = noisy.shape[1]
        words = self.get_input_embeddings()(context_ids)
        # The published layer takes t / T as a single number and adds it to every position of the block.
        progress = self.timestep(timesteps.to(words.dtype).view(-1, 1)).unsqueeze(1)
        mixed = self.embed_sum(noisy.softmax(dim=-1).to(words.dtype)) + progress
        if attention_mask is None or bool(attention_mask.all()):
            logits = self.model(inputs_embeds=torch.cat([words, mixed], dim=1)).logits
            return logits[:, width:].float()
        # Each row's block follows its own context, so that positions are those of the row alone; padding comes last.
        real = attention_mask.bool()
        lengths = real.sum(1, keepdim=True)
        order = (~real).long().argsort(dim=1, stable=True)
        column = torch.arange(width + block, device=words.device).expand(batch, -1)
        in_block_position = column - lengths
        in_block = (in_block_position >= 0) & (in_block_position < block)
        words = words.gather(1, order.unsqueeze(-1).expand_as(words))
        embeds = torch.cat([words, mixed], dim=1)
        source = torch.where(in_block, width + in_block_position, column.clamp(max=width - 1)).unsqueeze(-1)
        embeds = embeds.gather(1, source.expand(-1, -1, embeds.shape[-1]))
        logits = self.model(inputs_embeds=embeds, attention_mask=(column < lengths + block).long()).logits
        columns = lengths + torch.arange(block, device=words.device)
        return logits.gather(1, columns.unsqueeze(-1).expand(-1, -1, logits.shape[-1])).float()

    def _loss(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        noise: tuple[torch.Tensor | None, torch.Tensor | None],
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of one random block per text, weighted by the labelled tokens of that text.

        Also return that of each token `(batch, length)`, and which tokens were in the block and labelled.
        """
        config, (batch, width) = self.config, input_ids.shape
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        order = (~real).long().argsort(dim=1, stable=True)  # padding comes last
        labels = labels.masked_fill(~real, -100)
        ids, labels, lengths = input_ids.gather(1, order), labels.gather(1, order), real.sum(1)
        longest = lengths - config.block_size  # of the contexts
        if (longest < 1).any():
            raise ValueError(
                f"a text of {int(lengths.min())} tokens is too short for context and a block of {config.block_size}: "
                f"pack longer texts, or choose a smaller block_size."
            )
        # 1. The step, and where the block begins
        uniform, seeds = self._draws(noise, batch, input_ids.device)
        # Uniform on 1..T. The clamp catches uniform numbers that float32 rounds up to 1.
        t = (uniform[:, 0] * config.num_train_timesteps).floor().clamp(max=config.num_train_timesteps - 1) + 1
        begin = torch.minimum((uniform[:, 1] * longest).floor().long() + 1, longest)
        # 2. The noisy block
        columns = begin.unsqueeze(1) + torch.arange(config.block_size, device=ids.device)
        targets = labels.gather(1, columns).long()
        clean = almost_one_hot(ids.gather(1, columns), config.vocab_size, config.one_hot_value)
        normal = self._normal(seeds, clean)
        alpha_bar = simplex_alpha_bar(t, config.num_train_timesteps)
        noisy = noisy_logits(clean, alpha_bar, normal, config.one_hot_value)
        # 3. Its cross-entropy after the context
        context = torch.arange(width, device=ids.device) < begin.unsqueeze(1)
        context = context[:, : int(begin.max())]
        logits = self.denoise(ids[:, : context.shape[1]], context.long(), noisy, t / config.num_train_timesteps)
        token_losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
        # Mean over the block, weighted by the labelled tokens of the text: long texts count more, as in other losses.
        losses = token_losses.sum(1) / (targets != -100).sum(1).clamp(min=1)
        labelled = (labels != -100).sum(1)
        count = labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        columns = order.gather(1, columns)  # those of input_ids, where padding may come first
        nll = torch.zeros(input_ids.shape, device=ids.device).scatter(1, columns, token_losses.detach())
        mask = torch.zeros_like(input_ids).scatter(1, columns, (targets != -100).to(input_ids.dtype))
        return (losses * labelled).sum() / count, nll, mask

    def _draws(
        self, noise: tuple[torch.Tensor | None, torch.Tensor | None], batch: int, device: torch.device
    ) -> tuple[torch.Tensor, list[int]]:
        """Return uniform numbers `(batch, 2)`, and a seed of the Gaussian noise for each row."""
        block_noise, count_noise = noise
        if block_noise is None or count_noise is None:
            block_noise = torch.rand((batch, 2), device=device)
            count_noise = torch.rand((batch, 2), device=device)
        if block_noise.shape != (batch, 2) or count_noise.shape != (batch, 2):
            raise ValueError(
                f"block_noise of shape {tuple(block_noise.shape)} and count_noise of shape "
                f"{tuple(count_noise.shape)} do not fit this batch: give {(batch, 2)} for each."
            )
        # Uniform float32 numbers have 24 random bits each, which are exact in int64.
        high, low = (count_noise.cpu() * 2**24).long().unbind(1)
        return block_noise.to(device), (high * 2**24 + low).tolist()

    def _normal(self, seeds: list[int], like: torch.Tensor) -> torch.Tensor:
        """Draw standard normal numbers; those of a row depend on its seed, not on its batch or the device."""
        normal = torch.empty(like.shape, pin_memory=like.device.type == "cuda")
        for row, seed in zip(normal, seeds, strict=True):
            torch.randn(row.shape, generator=torch.Generator().manual_seed(seed), out=row)
        return normal.to(like.device, like.dtype, non_blocking=True)

    def token_nll(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, since the likelihood is not tractable.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "SSD-LM has no tractable likelihood: its loss is a cross-entropy of denoising, not a bound on log p(x). "
            "Use generative perplexity to score its samples."
        )


register_auto_classes(SSDLMForMaskedLM, "AutoModelForMaskedLM", "AutoModelForCausalLM")

__all__ = ["SSDLMForMaskedLM", "SSDLMOutput"]
