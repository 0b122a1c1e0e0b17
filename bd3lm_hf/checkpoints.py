"""Load checkpoints, and refuse weights that would score or train as garbage: missing, unexpected or not finite.

Low-rank adapters (LoRA, arXiv 2106.09685) come from the `peft` library. Adapted layers are no longer plain linear
layers, so the network computes them one by one, exactly as peft does. Once merged they are plain again, and the model
is as fast as its base.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from bd3lm_hf.data.sources import exists, looks_like_path
from bd3lm_hf.foreign_layouts import read_contract_config
from bd3lm_hf.user_files import BASE_NAME, find_fault, read_json


if TYPE_CHECKING:
    from peft import PeftModel

# peft is imported where it is used: its import takes seconds, and most commands do not need it.


# Adapters


def add_adapters(
    model: Any,
    *,
    rank: int,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: list[str] | None = None,
    train_mask_row: bool = False,
) -> "PeftModel":
    """Return the model with adapters; only they are trainable.

    Args:
        rank: rank of the update of each adapted matrix.
        alpha: the update is scaled by `alpha / rank`.
        dropout: dropout on the input of the adapters.
        targets: name suffixes of the layers to adapt, or `["all-linear"]` for all but the head.
        train_mask_row: also train the embedding of the mask token, and save it with the adapters. A decoder that has
            just been adapted has not learned it.

    Raises:
        ValueError: if no layer matches `targets`.
    """
    from peft import LoraConfig, get_peft_model

    table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    table = table.rpartition(".")[2]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        # An adapter on the whole embedding covers this row already.
        trainable_token_indices={table: [model.config.mask_token_id]}
        if train_mask_row and table not in (targets or ())
        else None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linears = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        names = sorted({re.sub(r"^.*?(\w+(\.\d+)?)$", r"\1", name) for name in linears})
        raise ValueError(f"{error} The linear layers of this model are {', '.join(names)}.") from error


def adapter_base(name: str) -> str | None:
    """Return the folder or hub name of the model that an adapter was trained on; None if `name` is not an adapter.

    Raises:
        ValueError: if the adapter does not name it.
    """
    try:
        found = find_adapter_config_file(name)
    except OSError:  # neither a folder nor available from the Hub, which the caller's own loading reports
        return None
    if found is None:
        return None
    with _reading(name, "the adapter"):
        base = read_json(found).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"The adapter {name!r} does not name the model that it was trained on: set base_model_name_or_path in its "
            "adapter_config.json."
        )
    if not exists(base):
        # `name` can be a run folder that has been moved, or one of its checkpoints; the run saved its base model.
        moved = [folder / BASE_NAME for folder in (Path(name), Path(name).parent) if (folder / BASE_NAME).is_dir()]
        return str(moved[0]) if moved and Path(base).name == BASE_NAME else base
    return base


def merge_adapter(base: Any, name: str) -> Any:
    """Return the base model with an adapter merged into its weights: a plain model, fully trainable.

    Raises:
        ValueError: if the adapter cannot be read, or belongs to another model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses names that transformers has renamed
            return PeftModel.from_pretrained(base, name).merge_and_unload().requires_grad_(True)
    except Exception as error:  # a damaged file makes the libraries raise nearly anything
        raise ValueError(
            f"The adapter {name!r} cannot be applied to its base model: {type(error).__name__}: {error}"
        ) from error


logger = logging.get_logger("bd3lm_hf.checkpoints")

# Buffers of the learned interval, which is in the configuration too. Checkpoints of full diffusion lack them.
_OPTIONAL_BUFFERS = {"sampling_eps_min", "sampling_eps_max"}


# Options that choose the files of a folder or hub name.
_FILE_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def read_config(name: str, *, argument: str = "--model", trust_remote_code: bool = False, **options: Any) -> Any:
    """Return the configuration of a folder or hub name; arguments and errors as in [`load_model`]."""
    if looks_like_path(name) and not exists(name):
        raise ValueError(f"{argument} {name}: there is no such folder; name a checkpoint folder or a hub model.")
    if Path(name).is_file():
        raise ValueError(f"{argument} {name} is a file: name the folder of a checkpoint.")
    base = adapter_base(name)
    if base is not None:
        return read_config(base, argument=f"{argument} {name} on", trust_remote_code=trust_remote_code)
    files = {key: options[key] for key in _FILE_OPTIONS if key in options}
    with _reading(name, argument):
        # Published decoders of other projects first: Stable-DiffCoder looks like a Llama to AutoConfig.
        contract_config = read_contract_config(name, files=files)
        return contract_config or AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **files)


def load_model(
    name: str,
    *,
    argument: str = "--model",
    trust_remote_code: bool = False,
    config: Any = None,
    skip_unexpected: bool = False,
    **options: Any,
) -> Any:
    """Load the model of a folder or hub name, with exactly its weights; merge an adapter into its base model.

    Args:
        argument: the flag that gave `name`, for messages.
        config: replaces the checkpoint's own configuration.
        skip_unexpected: skip weights that the model does not have, such as the pooler of many encoders, with a
            warning.
        options: for `from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: if the checkpoint cannot be read, weights are missing or unexpected, or any is not finite.
    """
    config = config or read_config(name, argument=argument, trust_remote_code=trust_remote_code, **options)
    base = adapter_base(name)
    if base is not None:
        options |= {"trust_remote_code": trust_remote_code, "config": config}
        return merge_adapter(load_model(base, argument=f"{argument} {name} on", **options), name)
    auto_class = _auto_class_of(config)
    for index in Path(name, options.get("subfolder") or "").glob("*.index.json"):
        read_shard_index(index)
    # Weights of the wrong shape are reported below, by name.
    options |= {"trust_remote_code": trust_remote_code, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with _reading(name, argument):
        model, info = auto_class.from_pretrained(name, config=config, **options)
    _check_loading_info(info, f"{argument} {name}", skip_unexpected=skip_unexpected)
    check_finite_weights(model, name)
    return model


def read_shard_index(path: Path) -> dict[str, str]:
    """Return the shard of each weight, from the index of a sharded checkpoint.

    Raises:
        ValueError: if the index is damaged, or names a file outside its folder, which transformers would read.
    """
    try:
        shards = read_json(path, max_bytes=100_000_000)["weight_map"]
        unsafe = [str(name) for name in shards.values() if name in ("", ".", "..") or re.search(r"[/\\:\0]", name)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a weight index ({type(error).__name__}: {error}).") from error
    if unsafe:
        raise ValueError(f"{path} names {unsafe[0]!r}, not a file in its folder: do not trust this checkpoint.")
    return shards


def _auto_class_of(config: Any) -> Any:
    # A masked language model of this package or with remote code; everything else is loaded as a causal one.
    has_remote_class = "AutoModelForMaskedLM" in (getattr(config, "auto_map", None) or {})
    if has_remote_class or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForMaskedLM
    return AutoModelForCausalLM


def _check_loading_info(info: dict[str, Any], origin: str, *, skip_unexpected: bool) -> None:
    # Both may be missing, but not one of them: that checkpoint is damaged.
    if set(info["missing_keys"]) >= _OPTIONAL_BUFFERS:
        info["missing_keys"] = set(info["missing_keys"]) - _OPTIONAL_BUFFERS
    if skip_unexpected and info["unexpected_keys"]:
        logger.warning(f"{origin}: {', '.join(sorted(info['unexpected_keys']))} are left out.")
        info["unexpected_keys"] = set()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(kind, ())):
            raise ValueError(
                f"{origin} has {len(keys)} {kind.removesuffix('_keys')} weights ({', '.join(keys[:8])}"
                f"{', ...' if len(keys) > 8 else ''}): it is a checkpoint of another model."
            )


@contextmanager
def _reading(name: str, argument: str) -> Iterator[None]:
    """Turn any failure to read a checkpoint into a ValueError."""
    try:
        yield
    except UnpicklingError as error:
        # Without torch's reason, a page of advice on how to run the code in the file.
        raise ValueError(
            f"{argument} {name} has pickled objects that are not tensors. They were not executed. Save only the "
            f"weights where the file was made, as safetensors."
        ) from error
    except Exception as error:  # a damaged file makes the libraries raise nearly anything
        reason = " ".join(str(error).split())[:500]
        if isinstance(error, ValueError) and reason.startswith("attn_implementation="):
            raise ValueError(f"{argument} {name}: {reason}") from error  # an option is wrong, not a file
        for file in sorted(Path(name).expanduser().glob("*")):
            if fault := find_fault(file):
                raise ValueError(f"{argument} {name} cannot be loaded: its {file.name} {fault}.") from error
        raise ValueError(
            f"{argument} {name} cannot be loaded; name a complete checkpoint: {type(error).__name__}: {reason}"
        ) from error


# Checks of a model


def find_device(name: str | None) -> torch.device:
    """Return the named device; by default a GPU, or the CPU if there is none.

    Raises:
        ValueError: if this machine has no such device.
    """
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: this machine has no such device; try --device cpu.") from error


def check_generates(model: Any, name: str) -> None:
    """Refuse a model that cannot generate, and warn that a plain decoder generates one token at a time."""
    if not getattr(model, "can_generate", lambda: False)():
        raise ValueError(f"--model {name} is a {type(model).__name__}, which cannot generate: name a model that can.")
    if not hasattr(model, "token_nll"):
        logger.warning(f"--model {name} is an autoregressive {type(model).__name__}. {how_to_adapt(name)}")


def window_of(model: Any) -> int:
    """Return how many tokens a model reads at once: `model_length`, or the limit of a plain decoder."""
    return getattr(model.config, "model_length", None) or model.config.max_position_embeddings


def how_to_adapt(name: str) -> str:
    """Return advice on turning a plain decoder into a block-diffusion model."""
    return (
        f"To turn it into a block-diffusion model, train it with `bd3lm train --init_from {name}`, or call "
        f"adapt_decoder in Python."
    )


class NotFiniteError(ValueError):
    """Weights contain NaN or infinity."""


def check_finite_weights(model: torch.nn.Module, origin: str) -> None:
    """Refuse a model whose weights or buffers contain NaN or infinity.

    With sharded weights, all processes must call this together; all get the same result.

    Args:
        origin: where the weights come from, for the message.

    Raises:
        NotFiniteError: if one does; the message names the first such tensor.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        # Weights that are offloaded to the disk are not read.
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise NotFiniteError(
                f"{count} of {tensor.numel()} values of {name} in {origin} are NaN or infinite: start from another "
                f"checkpoint."
            )
