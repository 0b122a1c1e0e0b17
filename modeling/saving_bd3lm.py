"""Saving a model whose folder needs nothing but transformers: `config.json` names its code and who can run it."""

import os
from collections.abc import Callable
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from .versions_bd3lm import TRANSFORMERS_VERSIONS


# To a type checker the base of a mixin is not a whole model: it is Any.
_Saveable: Any = object


class SelfContainedMixin(_Saveable):
    """Saves the code of a model with its weights; goes before the model class in the list of bases."""

    auto_classes: dict[str, type] = {}  # what each Auto class makes of a checkpoint
    share_folder: Callable[..., Any] | None = None  # uploads a saved folder, where bd3lm_hf is installed

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; `config.json` names the saved code for every Auto class, and states who can run it.

        transformers itself records one of them, and keeps what an earlier, perhaps foreign, `auto_map` said.
        """
        names = ((auto, cls.__module__.rpartition(".")[2], cls.__name__) for auto, cls in self.auto_classes.items())
        self.config.auto_map = {auto: f"{module}.{name}" for auto, module, name in names}
        self.config.requires_transformers = TRANSFORMERS_VERSIONS
        super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_modified_files(  # type: ignore[override]  # transformers names all of them
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **options: Any
    ) -> Any:
        """`push_to_hub` as in transformers; with bd3lm_hf, what `bd3lm push` uploads: no file of another kind."""
        if self.share_folder is None:
            return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **options)
        return self.share_folder(working_dir, repo_id, tags=self.model_tags or (), **options)


class SelfContainedModel(SelfContainedMixin, PreTrainedModel):
    """A model whose code travels with its weights."""


__all__ = ["SelfContainedMixin", "SelfContainedModel"]
