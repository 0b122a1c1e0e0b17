"""Check the inputs of a forward pass, and take packed documents apart."""

import difflib
import inspect
from typing import Any, NamedTuple

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Read by transformers' wrapper of forward, or sent by tokenizers and generate without a meaning for these models.
_HARMLESS = {"return_dict", "output_hidden_states", "output_attentions", "token_type_ids", "cache_position"}
# What DataCollatorWithFlattening adds for FlashAttention says again what position_ids say.
_WITH_POSITIONS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def check_arguments(model: Any, given: dict[str, Any], position_ids: torch.Tensor | None = None) -> None:
    """Refuse keyword arguments that `forward` would silently ignore.

    Raises:
        ValueError: if an argument other than None is unknown.
    """
    harmless = _HARMLESS if position_ids is None else _HARMLESS | _WITH_POSITIONS
    unknown = sorted(name for name, value in given.items() if value is not None and name not in harmless)
    if not unknown:
        return
    known = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind != p.VAR_KEYWORD]
    close = difflib.get_close_matches(unknown[0], known, 1)
    raise ValueError(
        f"{type(model).__name__} takes no argument {', '.join(map(repr, unknown))}"
        + (f"; did you mean {close[0]!r}? " if close else ". ")
        + f"It takes {', '.join(known)}."
    )


def check_with_labels(input_ids: torch.Tensor | None, **unused: Any) -> None:
    """Refuse what the loss would ignore.

    Raises:
        ValueError: if there are no ids, or an argument that only the logits depend on.
    """
    given = [name for name, value in unused.items() if value is not None]
    if given or input_ids is None:
        raise ValueError(
            f"labels need input_ids and do not go with {', '.join(given) or 'None'}: the loss masks tokens of the "
            f"clean text by itself. Pass input_ids and labels, or leave labels out for logits. Prompt and prefix "
            f"tuning are not supported: use LoRA."
        )


def check_token_ids(input_ids: torch.Tensor | None, vocab_size: int, name: str) -> None:
    """Refuse ids outside the vocabulary while the error can still be understood.

    On an accelerator the look would cost a synchronisation per step, and the device's own assertion catches it.

    Raises:
        ValueError: if an id is below 0 or not below `vocab_size`.
    """
    if input_ids is None or torch.compiler.is_compiling() or input_ids.device.type != "cpu" or not input_ids.numel():
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} holds the id {low if low < 0 else high}, outside the vocabulary of {vocab_size} ids (0 to "
            f"{vocab_size - 1}): use the tokenizer that the model was trained with."
        )


def check_attention_mask(attention_mask: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a mask of another shape or kind; `shape` is (batch, cached + given tokens).

    Raises:
        ValueError: if the mask would be broadcast or cut, or is additive.
    """
    if attention_mask is None:
        return
    if tuple(attention_mask.shape) != tuple(shape):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit tokens of shape {tuple(shape)}: give "
            f"one 0 (padding) or 1 per token, the cached ones included."
        )
    additive = attention_mask.is_floating_point() and attention_mask.device.type == "cpu"
    if additive and not torch.compiler.is_compiling() and bool((attention_mask < 0).any()):
        raise ValueError(
            f"attention_mask holds {float(attention_mask.min())}, as an additive mask does: give one 0 (padding) or 1 "
            f"per token."
        )


def warn_of_visible_tokens(
    network: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, mask_token_id: int
) -> None:
    """Warn once when there is nothing to denoise: a caller probably takes the outputs for next-token predictions.

    On an accelerator only the first call of a network is looked at, as each look waits for the device.
    """
    if torch.compiler.is_compiling():
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
            f"A block-diffusion model was given a text without a mask token (mask_token_id={mask_token_id}). Its "
            f"outputs are not next-token predictions: each position sees its own token. Shifting them by one, as "
            f"TRL's SFTTrainer and DPOTrainer or lm_eval's hf model do, gives wrong losses and scores. Use "
            f"model(input_ids, labels=...) with the Trainer or `bd3lm train`, model.token_nll(input_ids) for scores, "
            f"or model.generate(...) for text."
        )


class Documents(NamedTuple):
    """Documents that were packed side by side, as rows of their own, padded on the right."""

    index: torch.Tensor  # type: ignore[assignment]  # (documents, longest), flat index of each token in the packed batch
    mask: torch.Tensor  # bool (documents, longest), False for padding

    def split(self, packed: torch.Tensor, padding: int) -> torch.Tensor:
        """Return values of packed tokens `(batch, length)` as `(documents, longest)`."""
        return packed.flatten()[self.index].masked_fill(~self.mask, padding)

    def join(self, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return values of documents `(documents, longest)` in their packed places, zero elsewhere."""
        joined = values.new_zeros(shape.numel())
        joined[self.index[self.mask]] = values[self.mask]
        return joined.view(shape)


def find_documents(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, shape: torch.Size
) -> Documents | None:
    """Find documents that share a row, told apart by positions that start again, as in padding-free batches.

    A loss draws a noise level for each block of each document, so it takes the documents apart. This waits for the
    device once.

    Returns:
        None if no row holds more than one document.

    Raises:
        ValueError: if the positions do not fit the batch, or a document does not begin at position 0.
    """
    if position_ids is None:
        return None
    if tuple(position_ids.shape) not in (tuple(shape), (1, shape[1])):
        raise ValueError(
            f"position_ids of shape {tuple(position_ids.shape)} do not fit tokens of shape {tuple(shape)}."
        )
    position_ids = position_ids.expand(shape)
    real = torch.ones(shape, dtype=torch.bool, device=position_ids.device)
    real = real if attention_mask is None else attention_mask.bool()
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1] | (position_ids[:, 1:] != position_ids[:, :-1] + 1)
    if (position_ids[begins] != 0).any():
        raise ValueError(
            f"position_ids begin a document at position {int(position_ids[begins].max())}: count the tokens of each "
            f"document from 0, or leave position_ids out."
        )
    if int(begins.sum(1).max()) <= 1:
        return None
    packed = real.flatten().nonzero().squeeze(1)
    document = (begins.flatten().cumsum(0) - 1)[packed]
    column = position_ids.flatten()[packed]
    size = (int(document[-1]) + 1, int(column.max()) + 1)
    index = torch.zeros(size, dtype=torch.long, device=packed.device)
    mask = torch.zeros(size, dtype=torch.bool, device=packed.device)
    index[document, column] = packed
    mask[document, column] = True
    return Documents(index, mask)


__all__ = [
    "Documents",
    "check_arguments",
    "check_attention_mask",
    "check_token_ids",
    "check_with_labels",
    "find_documents",
    "warn_of_visible_tokens",
]
