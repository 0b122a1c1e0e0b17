"""Sharing a saved folder on the hub, for whoever has one: a model that was just saved, or a training run.

What does it, `hub_upload`, is the last room, on which the others do not depend: it is found by name, when asked for.
"""

import importlib
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi


def share_folder(
    folder: str | Path, repo_id: str, *, token: str | bool | None = None, background: bool = False, **options: Any
) -> Any:
    """Upload what `bd3lm push` would, and leave the model card in the folder.

    Args:
        folder: as for `bd3lm push`; a tokenizer is shared where it lies there.
        token: by default that of the environment or the login.
        background: return a future as soon as the files are written and checked.
        options: of `bd3lm_hf.hub_upload.push.push`.

    Returns:
        The address of the repository, the commit or the pull request; with `background` a future of the `Upload`,
        which has it as `url`.

    Raises:
        As `push`.
    """
    share = importlib.import_module("bd3lm_hf.hub_upload.push").share
    return share(Path(folder), repo_id, api=HfApi(token=token), background=background, **options)


def write_card(folder: str | Path, model: Any, repo_id: str, **options: Any) -> None:
    """Write the model card of a saved folder into it.

    Args:
        options: of `bd3lm_hf.hub_upload.card.make_card`.
    """
    card = importlib.import_module("bd3lm_hf.hub_upload.card").make_card(model, Path(folder), repo_id, **options)
    card.save(Path(folder, "README.md"))


__all__ = ["share_folder", "write_card"]
