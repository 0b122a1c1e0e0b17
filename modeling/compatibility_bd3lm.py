"""Make models fit transformers: check its version, save self-contained folders, refuse code that misreads the outputs.

The version is checked when a saved folder is first imported.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.utils import logging
from transformers.utils.versions import require_version


logger = logging.get_logger(__name__)

TRANSFORMERS_VERSIONS = ">=5.12,<6"
require_version(f"transformers{TRANSFORMERS_VERSIONS}")


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


def register_auto_classes(head: type[SelfContainedMixin], *names: str, backbone: Any = None) -> None:
    """Make the Auto classes called `names` load a model from saved folders, and `AutoModel` its backbone if given."""
    classes: dict[str, type] = {"AutoConfig": head.config_class}
    if backbone is not None:
        classes["AutoModel"] = backbone
        backbone.auto_classes = classes
        backbone.register_for_auto_class("AutoModel")
    head.auto_classes = classes
    classes.update(dict.fromkeys(names, head))
    head.register_for_auto_class(names[0])


def check_config_class(model_class: Any, config: Any) -> None:
    """Refuse to make a model from the configuration of another model type.

    Raises:
        ValueError: if the types differ; the message names both classes.
    """
    expected = model_class.config_class
    if config.model_type != expected.model_type:
        raise ValueError(
            f"a {model_class.__name__} cannot be made from a {type(config).__name__} "
            f"(model_type={config.model_type!r}): pass a {expected.__name__}, let AutoModelForCausalLM.from_config "
            f"choose the class, or adapt a decoder with bd3lm_hf.adapt_decoder."
        )


class OwnLossMixin:
    """A model whose loss is not a function of logits and labels, and cannot be replaced by one."""

    def loss_function(self, *args: Any, **kwargs: Any) -> None:
        """Refuse the loss that transformers gives every model, which compares each token with the one before it."""
        raise ValueError(
            f"{type(self).__name__} has no loss of logits and labels: call model(input_ids, labels=...) for its "
            f"objective, or train it with `bd3lm train`."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        # Not a property, which torch bypasses when it registers a module such as nn.CrossEntropyLoss().
        if name == "loss_function":
            raise ValueError(
                f"loss_function was assigned to a {type(self).__name__}, which computes its own objective and would "
                f"never call it. Leave it out; a Trainer whose compute_loss is overridden can use another loss."
            )
        super().__setattr__(name, value)


# Files whose code misreads the logits. Only the file name of a frame is read: security checks forbid reading its
# variables, through which code could reach anything.
_NEXT_TOKEN_CALLERS = re.compile(
    r"lm_eval[/\\]models[/\\]huggingface\.py$|evaluate_modules[/\\].*[/\\]perplexity\.py$"
)
_TRAINER = re.compile(r"transformers[/\\]trainer\.py$")
_CLASSIFIERS = re.compile(r"transformers[/\\]pipelines[/\\](text|token|zero_shot)_classification\.py$")
_FILL_MASK = re.compile(r"transformers[/\\]pipelines[/\\]fill_mask\.py$")
_INSTEAD_OF_NEXT_TOKENS = (
    "its logits are not next-token predictions, so every score would be wrong. Use `bd3lm harness` for the tasks of "
    "lm_eval, `bd3lm eval` for perplexity, or model.token_nll(input_ids)"
)
_INSTEAD_OF_CLASSES = "it has no classes. Use the pipelines text-generation and fill-mask"
_INSTEAD_OF_MASK_PADDING = (
    "it would mistake padding, which is the mask token here, for blanks. Set another tokenizer.pad_token, or pass one "
    "text at a time"
)


def check_caller(config: Any, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
    """Refuse a call for logits from code that is known to misinterpret them or the ids.

    The arguments of such a call are those of a call for the logits of masked tokens: only the stack differs.

    Raises:
        ValueError: if a harness or metric expects next-token predictions from a model without them, or a pipeline
            expects classes, or fills blanks in rows that are padded with the mask token.
    """
    if torch.compiler.is_compiling():
        return
    for file in _calling_files():
        instead = _INSTEAD_OF_CLASSES if _CLASSIFIERS.search(file) else None
        if not config.causal and _NEXT_TOKEN_CALLERS.search(file):
            instead = _INSTEAD_OF_NEXT_TOKENS
        if _FILL_MASK.search(file) and _pads_with_mask(input_ids, attention_mask, config.mask_token_id):
            instead = _INSTEAD_OF_MASK_PADDING
        if instead is not None:
            raise ValueError(f"the code in {file} does not fit model_type={config.model_type!r}: {instead}.")


def _pads_with_mask(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, mask_token_id: int) -> bool:
    if input_ids is None or attention_mask is None:
        return False
    return bool(((input_ids == mask_token_id) & (attention_mask == 0)).any())


def _calling_files() -> Iterator[str]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def warn_of_visible_tokens(
    network: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, mask_token_id: int
) -> None:
    """Warn once if there is nothing to denoise: the caller probably expects next-token predictions.

    On an accelerator only the first call of a network is checked, since each check waits for the device.
    """
    if torch.compiler.is_compiling() or input_ids.is_meta:
        return
    if input_ids.device.type != "cpu":
        if vars(network).get("_inputs_seen"):
            return
        vars(network)["_inputs_seen"] = True
    masked = input_ids == mask_token_id
    if attention_mask is not None and attention_mask.shape == masked.shape:
        masked = masked & attention_mask.bool()
    if not masked.any():
        logger.warning_once(
            f"A block-diffusion model got a text without a mask token (mask_token_id={mask_token_id}). Its "
            f"outputs are not next-token predictions: each position sees its own token. Shifting them by one, as "
            f"TRL's SFTTrainer and DPOTrainer or lm_eval's hf model do, gives wrong losses and scores. Use "
            f"model(input_ids, labels=...) with the Trainer or `bd3lm train`, model.token_nll(input_ids) for scores, "
            f"or model.generate(...) for text."
        )


def check_not_next_token_training(
    network: torch.nn.Module, input_ids: torch.Tensor | None, config: Any, *, in_trainer: bool = False
) -> None:
    """Refuse calls of trainers that compute a next-token loss from the states or logits of clean text.

    TRL's trainers never ask the model for its loss: they call `model.base_model` and shift its states by one. A block
    is bidirectional, so these states see the very token that they would be trained to predict.

    Args:
        in_trainer: only if transformers' Trainer calls, whose `compute_loss` may have removed the labels.

    Raises:
        ValueError: if a text in training has no mask token and no earlier one had any. After one that had, a custom
            denoising loss may have masked nothing by chance.
    """
    if not (network.training and torch.is_grad_enabled()) or config.causal or input_ids is None:
        return
    if torch.compiler.is_compiling() or input_ids.is_meta or vars(network).get("_masks_seen"):
        return
    if in_trainer and not any(_TRAINER.search(file) for file in _calling_files()):
        return
    vars(network)["_masks_seen"] = bool((input_ids == config.mask_token_id).any())
    if not vars(network)["_masks_seen"]:
        raise ValueError(
            "text without a mask token in training, and no labels: a next-token loss does not train a block-diffusion "
            "model. Use `bd3lm train`, or transformers' Trainer with the labels of a "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False); TRL's SFTTrainer works with a compute_loss that "
            "returns model(**inputs).loss."
        )
