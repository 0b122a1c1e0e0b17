"""What the models of this family share with transformers: loading, saving, initialisation, outputs, Auto classes."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_bd3lm import BD3LMConfig
from .layers_bd3lm import BD3LMEmbedding, BD3LMLayerNorm, BD3LMRotaryEmbedding, BD3LMZeroLinear


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


class BD3LMPreTrainedModel(PreTrainedModel):
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

    auto_classes: dict[str, type] = {}  # what each Auto class makes of a checkpoint, see `register_auto_classes`
    share_folder: Callable[..., Any] | None = None  # uploads a saved folder, where bd3lm_hf is installed

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; `config.json` names the saved code for every Auto class.

        transformers itself records one of them, and keeps what an earlier, perhaps foreign, `auto_map` said.
        """
        names = ((auto, cls.__module__.rpartition(".")[2], cls.__name__) for auto, cls in self.auto_classes.items())
        self.config.auto_map = {auto: f"{module}.{name}" for auto, module, name in names}
        super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_modified_files(  # type: ignore[override]  # transformers names all of them
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **options: Any
    ) -> Any:
        """`push_to_hub` as in transformers; with bd3lm_hf, what `bd3lm push` uploads: no file of another kind."""
        if self.share_folder is None:
            return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **options)
        return self.share_folder(working_dir, repo_id, tags=self.model_tags or (), **options)

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
