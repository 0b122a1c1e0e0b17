"""Saving a model whose folder needs nothing but transformers: `config.json` names its code for every Auto class."""

import os
from typing import Any

from transformers.modeling_utils import PreTrainedModel


class SelfContainedModel(PreTrainedModel):
    """A model whose code travels with its weights."""

    auto_classes: dict[str, type] = {}  # what each Auto class makes of a checkpoint

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; `config.json` names the saved code for every Auto class.

        transformers itself records one of them, and keeps what an earlier, perhaps foreign, `auto_map` said.
        """
        names = ((auto, cls.__module__.rpartition(".")[2], cls.__name__) for auto, cls in self.auto_classes.items())
        self.config.auto_map = {auto: f"{module}.{name}" for auto, module, name in names}
        super().save_pretrained(save_directory, *args, **kwargs)


__all__ = ["SelfContainedModel"]
