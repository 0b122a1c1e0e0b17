"""What the models of this family share with transformers: loading, saving, initialisation, outputs, Auto classes."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from .configuration_bd3lm import BD3LMConfig
from .layers_bd3lm import BD3LMEmbedding, BD3LMLayerNorm, BD3LMRotaryEmbedding, BD3LMZeroLinear
from .saving_bd3lm import SelfContainedModel


if TYPE_CHECKING:
    from .modeling_bd3lm import BD3LMLanguageModel


@dataclass
class BD3LMOutput(ModelOutput):
    """Output of [`BD3LMForMaskedLM`].

    Args:
        loss: scalar, nats per scored token, when `labels` are given.
        logits: `(batch, length, vocab_size)`, raw: no SUBS parameterisation; absent when `labels` are given, so that
            no `(batch, length, vocab_size)` tensor is ever built in training or gathered in evaluation.
        past_key_values: the cache, when one was used.
        hidden_states: embeddings and the output of each layer, when asked for.
        attentions: attention weights of each layer, when asked for (eager attention only).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class BD3LMPreTrainedModel(SelfContainedModel):
    """Loading, saving and initialisation shared by the models on this backbone."""

    config_class = BD3LMConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BD3LMBlock"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _supports_context_parallel = False
    _keep_in_fp32_modules_strict = ["inv_freq"]

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Seeded inputs of a forward pass without a loss, on the CPU."""
        config, generator = self.config, torch.Generator().manual_seed(0)
        length = min(config.model_length, 4 * config.block_size)
        inputs = {"input_ids": torch.randint(0, config.vocab_size, (2, length), generator=generator)}
        return {**inputs, "timesteps": torch.tensor([0.1, 1.0])} if config.time_conditioning else inputs

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published initialisation: PyTorch's defaults, with adaLN and the head at zero.

        A fresh model has gates of zero, so every layer is the identity and the logits are uniform.
        """
        if isinstance(module, BD3LMEmbedding):
            init.kaiming_uniform_(module.embedding, a=math.sqrt(5))
        elif isinstance(module, BD3LMZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, BD3LMLayerNorm):
            init.ones_(module.weight)
        elif isinstance(module, BD3LMRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies(torch.float32))
        if "sampling_eps_min" in module._buffers:
            init.constant_(module.get_buffer("sampling_eps_min"), float(self.config.sampling_eps_min))
            init.constant_(module.get_buffer("sampling_eps_max"), float(self.config.sampling_eps_max))


def register_auto_classes(head: "type[BD3LMLanguageModel]", *names: str) -> None:
    """Have the Auto classes called `names` load a language model, `AutoModel` its backbone, in any saved folder."""
    backbone = head.backbone_class
    classes: dict[str, type] = {"AutoConfig": head.config_class, "AutoModel": backbone, **dict.fromkeys(names, head)}
    head.auto_classes = backbone.auto_classes = classes
    backbone.register_for_auto_class("AutoModel")
    head.register_for_auto_class(names[0])


__all__ = ["BD3LMOutput", "BD3LMPreTrainedModel", "register_auto_classes"]
