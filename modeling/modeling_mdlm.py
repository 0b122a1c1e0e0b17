"""Masked diffusion (MDLM, arXiv 2406.07524), a baseline of BD3-LM: a single block, as long as the text.

Objective, likelihood and samplers are those of block diffusion with no earlier block to attend to.
"""

from typing import Any

import torch

from .backbone_bd3lm import BD3LMModel
from .compatibility_bd3lm import register_auto_classes
from .configuration_bd3lm import MDLMConfig
from .inputs_bd3lm import may_read
from .modeling_bd3lm import BD3LMForMaskedLM


class MDLMModel(BD3LMModel):
    """The backbone with attention over the whole sequence, which is at most `config.model_length` tokens long."""

    config_class = MDLMConfig

    def run(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        window, length = self.config.model_length, inputs_embeds.shape[1]
        if length > window and may_read(position_ids.device, True):
            length = int(position_ids.max()) + 1  # packed documents are each counted from their start
            if length > window:
                raise ValueError(
                    f"a text of {length} tokens does not fit the window, model_length={window}, of a model that "
                    f"attends to all of it at once: cut it into windows."
                )
        return super().run(inputs_embeds, position_ids, *args, **kwargs)


class MDLMForMaskedLM(BD3LMForMaskedLM):
    """Masked diffusion language model. `model(x_t).logits` are raw (no SUBS), with attention over the whole text.

    `generate` denoises one window of `model_length` tokens, which begins with the prompt. Longer texts are generated
    semi-autoregressively: the window moves by `window_stride` tokens, half of it by default (as published), keeps the
    tokens that it still contains, and denoises the new ones.
    """

    config_class = MDLMConfig
    backbone_class = MDLMModel


register_auto_classes(MDLMForMaskedLM, "AutoModelForMaskedLM", "AutoModelForCausalLM", backbone=MDLMModel)

__all__ = ["MDLMForMaskedLM", "MDLMModel"]
