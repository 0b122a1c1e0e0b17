"""Uploads of a Trainer with `push_to_hub`: the same files as `bd3lm push`, and nothing else from the output folder."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from bd3lm_hf.data.sources import is_local
from bd3lm_hf.hub_upload.push import push_saved_folder
from bd3lm_hf.training.arguments import BD3LMTrainingArguments


logger = logging.get_logger("bd3lm_hf.train")


class UploadingTrainer(Trainer):
    """Upload exactly the files of the model, where transformers' Trainer uploads its output folder, pickles included.

    Raises:
        ValueError: if `args.push_to_hub` is set for an adapter on a model that is not on the Hub.
    """

    args: BD3LMTrainingArguments
    hub_model_id: Any
    push_in_progress: Any

    def __init__(self, model: Any = None, args: Any = None, *arguments: Any, **keywords: Any) -> None:
        if args is not None and args.push_to_hub:
            _check_base(model)
        super().__init__(model, args, *arguments, **keywords)

    def write_model(self, folder: str | Path) -> None:
        """Write the model to upload into a folder; all processes take part."""
        raise NotImplementedError

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and upload it as `bd3lm push` does, in one commit.

        Args:
            kwargs: `language`, `license` and `tags` of the model card.

        Returns:
            The URL of the commit or, if not `blocking`, a future whose result has it as `url`; None in all but the
            main process.

        Raises:
            OSError: if the Hub or the network failed.
            RuntimeError: if the saved folder does not load without bd3lm_hf.
        """
        if self.hub_model_id is None:
            if private is not None:
                self.args.hub_private_repo = private  # earlier versions of transformers read it only from here
            self.init_hf_repo(token=token)
        self.write_model(self.args.output_dir)
        options: dict[str, Any] = {name: kwargs[name] for name in ("language", "license") if name in kwargs}
        tags = kwargs.get("tags") or []
        options |= {"tags": [tags] if isinstance(tags, str) else tags, "background": not blocking, "token": token}
        return self.upload_model(commit_message, revision=revision or self.args.hub_revision, **options)

    def upload_model(self, message: str | None, **options: Any) -> Any:
        """Upload the output folder in the main process; arguments and errors as in `push_saved_folder`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        options.setdefault("revision", self.args.hub_revision)
        return push_saved_folder(self.args.output_dir, self.hub_model_id, commit_message=message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        # One upload at a time, unless hub_always_push asks for every checkpoint.
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        options: dict[str, Any] = {"revision": self.args.hub_revision, "background": True}
        try:
            job = push_saved_folder(checkpoint_folder, self.hub_model_id, commit_message=message, **options)
        except (OSError, ValueError, RuntimeError) as error:  # must not end the run
            logger.warning(f"{checkpoint_folder} was not uploaded: {error}")
            return
        job.add_done_callback(_log_failure)
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]  # transformers passes lists too


def _check_base(model: Any) -> None:
    """Refuse to train an adapter that could not be uploaded because its base model is a local folder."""
    for config in getattr(model, "peft_config", {}).values():
        base = str(config.base_model_name_or_path)
        if is_local(base):
            raise ValueError(
                f"--push_to_hub: the base of this adapter is the local folder {base}, which others cannot load. Leave "
                f"the argument out, push the base, and then the adapter with `bd3lm push --base-model`."
            )


def _log_failure(job: Future) -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning(f"an upload in the background failed: {error}")
