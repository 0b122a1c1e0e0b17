"""Save a model so that its folder needs only transformers: `config.json` names its code and versions."""

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from .compatibility_bd3lm import TRANSFORMERS_VERSIONS


# Any to a type checker, which would not accept a mixin as a whole model.
_Saveable: Any = object


class SelfContainedMixin(_Saveable):
    """Save a model's code with its weights. List this mixin before the model class."""

    auto_classes: dict[str, type] = {}  # Auto class -> the class it loads
    # Uploads a saved folder. Set by bd3lm_hf, which need not be installed where this code runs.
    push_saved_folder: Callable[..., Any] | None = None
    # Gives saved weights the file permissions of `config.json`. Also set by bd3lm_hf.
    share_saved_weights: Callable[..., Any] | None = None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the code of every Auto class and the supported versions in `config.json`.

        transformers records only one Auto class, and keeps the entries of an earlier, perhaps foreign, `auto_map`.
        """
        names = ((auto, cls.__module__.rpartition(".")[2], cls.__name__) for auto, cls in self.auto_classes.items())
        self.config.auto_map = {auto: f"{module}.{name}" for auto, module, name in names}
        self.config.requires_transformers = TRANSFORMERS_VERSIONS
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.share_saved_weights is not None:
            self.share_saved_weights(save_directory)

    @property
    def device(self) -> torch.device:
        """Return the device as transformers does; for offloaded weights, the device that computes with them."""
        # accelerate's offloading leaves meta tensors; a hook on each module knows where it runs.
        device = super().device
        if device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        executing = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(found) for found in executing if found is not None), device)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **options: Any
    ) -> Any:
        """Upload as `bd3lm push` does where bd3lm_hf is installed, else as transformers does."""
        if self.push_saved_folder is None:
            return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **options)
        return self.push_saved_folder(working_dir, repo_id, tags=self.model_tags or (), **options)


class SelfContainedModel(SelfContainedMixin, PreTrainedModel):
    """A model whose code travels with its weights."""
