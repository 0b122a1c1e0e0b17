"""Check the inputs of a forward pass, and find the positions, blocks and documents of its tokens."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from .cache_bd3lm import StepCache, check_rows, note_tokens, open_cache
from .compatibility_bd3lm import check_caller, warn_of_visible_tokens


# Read by transformers' wrappers of forward, or passed by tokenizers and generate but not used by these models.
_HARMLESS = {"return_dict", "output_hidden_states", "output_attentions", "token_type_ids", "cache_position"}
# DataCollatorWithFlattening adds these for FlashAttention. They repeat the information in position_ids.
_WITH_POSITIONS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def check_arguments(model: Any, given: dict[str, Any], position_ids: torch.Tensor | None = None) -> None:
    """Refuse keyword arguments that `forward` would silently ignore.

    Raises:
        ValueError: if an argument other than None is unknown.
    """
    harmless = _HARMLESS if position_ids is None else _HARMLESS | _WITH_POSITIONS
    unknown = sorted(name for name, value in given.items() if value is not None and name not in harmless)
    if unknown:
        known = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind != p.VAR_KEYWORD]
        raise ValueError(
            f"{type(model).__name__} takes no argument {', '.join(map(repr, unknown))}: it takes {', '.join(known)}."
        )


def check_loss_arguments(
    labels: torch.Tensor | None, num_items_in_batch: Any, input_ids: torch.Tensor | None, **unused: Any
) -> None:
    """Refuse labels without ids or with arguments that the loss would ignore, and a number of items without labels.

    Raises:
        ValueError: if there are labels but no ids, or labels and an argument that affects only the logits; if there is
            a number of items but no labels; see also [`check_ids`].
    """
    if labels is None:
        if num_items_in_batch is not None:  # from a Trainer that computes the loss outside the model
            raise ValueError(
                "num_items_in_batch was passed without labels, as by a Trainer with label_smoothing_factor or "
                "compute_loss_func: this model computes its own loss. Leave these out so that the labels reach it."
            )
        return
    given = [name for name, value in unused.items() if value is not None]
    if given or input_ids is None:
        raise ValueError(
            f"labels need input_ids{' and exclude ' if given else ''}{', '.join(given)}: the loss masks tokens of the "
            f"clean text itself. Pass input_ids and labels, or leave labels out for logits. Prompt and prefix tuning "
            f"are not supported: use LoRA."
        )
    check_ids(input_ids, "input_ids")


def check_token_ids(input_ids: torch.Tensor | None, vocab_size: int, name: str) -> None:
    """Refuse ids outside the vocabulary while the error can still be understood.

    On an accelerator, reading the ids would cost a synchronisation per step; there the device's own assertion fails.

    Raises:
        ValueError: see [`check_ids`]; or if an id is below 0 or not below `vocab_size`.
    """
    if input_ids is None:
        return
    check_ids(input_ids, name)
    if not torch.compiler.is_compiling() and input_ids.device.type == "cpu":
        check_vocabulary(input_ids, vocab_size, name)


def check_vocabulary(ids: torch.Tensor, vocab_size: int, name: str) -> None:
    """Refuse ids outside the vocabulary. Waits for the device.

    Raises:
        ValueError: if an id is below 0 or not below `vocab_size`.
    """
    if not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} contains the id {low if low < 0 else high}, outside the vocabulary of {vocab_size} ids (0 to "
            f"{vocab_size - 1}): use the tokenizer that the model was trained with."
        )


def check_ids(ids: Any, name: str) -> None:
    """Refuse ids or labels that are not a batch of tokens.

    Raises:
        ValueError: if they are not a tensor, not of dtype int64 or int32, not `(batch, length)`, or empty.
    """
    if not isinstance(ids, torch.Tensor):
        remedy = "its fields, model(**batch)" if isinstance(ids, Mapping) else 'tokenizer(..., return_tensors="pt")'
        raise ValueError(f"{name} is a {type(ids).__name__}, not a tensor: pass {remedy}.")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} of dtype {ids.dtype}: token ids are whole numbers, so pass {name}.long().")
    if not torch.compiler.is_compiling() and (ids.dim() != 2 or not ids.numel()):
        one = f": a single text is {name}.unsqueeze(0)" if ids.dim() == 1 and ids.numel() else ""
        raise ValueError(f"{name} of shape {tuple(ids.shape)}: pass texts of shape (batch, length){one}.")


def check_attention_mask(attention_mask: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a mask of the wrong shape or kind; `shape` is (batch, cached + given tokens).

    Raises:
        ValueError: if the mask is not a tensor of this shape, is additive, or numbers packed documents.
    """
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}: pass a tensor of {tuple(shape)}.")
    if tuple(attention_mask.shape) != tuple(shape):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit tokens of shape {tuple(shape)}: give "
            f"one 0 (padding) or 1 per token, the cached ones included."
        )
    if attention_mask.dtype == torch.bool or not may_read(attention_mask.device, None):
        return
    other = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
    if other.numel():
        raise ValueError(
            f"attention_mask contains {float(other[0]):g}: give one 0 (padding) or 1 per token. Mark packed "
            f"documents in position_ids."
        )


def default_labels(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return labels that score every token of a text except padding."""
    return input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)


def generators_of_texts(input_ids: torch.Tensor, labels: torch.Tensor) -> list[torch.Generator]:
    """Return a generator for each row whose seed depends on its scored tokens alone, not on its batch or padding."""
    generators = []
    for row, row_labels in zip(input_ids.tolist(), labels.tolist(), strict=True):
        seed = 0
        for token, label in zip(row, row_labels, strict=True):
            seed = (seed * 1_000_003 + token + 1) % 2**62 if label != -100 else seed  # a polynomial hash
        generators.append(torch.Generator().manual_seed(seed))
    return generators


def check_text(
    config: PreTrainedConfig,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    may_synchronize: bool | None = None,
) -> None:
    """Refuse text that cannot be trained on or scored.

    Padding is not checked: tokenizers without a padding token are often given the mask token as one.

    Args:
        may_synchronize: whether to wait for the device to read ids; by default on a CPU only. Training cannot afford
            to wait, so its collator checks the batch on the CPU.

    Raises:
        ValueError: if ids are outside the vocabulary, if the text contains mask tokens, or if the labels do not fit,
            see [`check_labels`].
    """
    check_labels(config, input_ids, labels, attention_mask, may_synchronize=may_synchronize)
    if not may_read(input_ids.device, may_synchronize):
        return
    valid = _valid_tokens(labels, attention_mask)
    scored = (labels != -100) & valid
    check_token_ids(input_ids, config.vocab_size, "input_ids")
    check_vocabulary(labels[scored], config.vocab_size, "labels")
    for name, ids in (("input_ids", input_ids[valid]), ("labels", labels[scored])):
        if count := int((ids == config.mask_token_id).sum()):
            raise ValueError(
                f"{name} contain mask_token_id={config.mask_token_id} at {count} positions that are not padding: the "
                f"model masks the clean text itself and never predicts the mask token. Pass the clean text "
                f"(DataCollatorForLanguageModeling(..., mlm=False)), and mark padding in attention_mask."
            )


def check_labels(
    config: PreTrainedConfig,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    may_synchronize: bool | None = None,
) -> None:
    """Refuse labels that are not those of the text; see [`check_text`].

    Raises:
        ValueError: see [`check_ids`]; if labels or attention mask have another shape than the ids, or if the labels
            are the ids shifted by one.
    """
    check_ids(input_ids, "input_ids")
    check_ids(labels, "labels")
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not match input_ids of {tuple(input_ids.shape)}.")
    check_attention_mask(attention_mask, input_ids.shape)
    if not may_read(input_ids.device, may_synchronize):
        return
    scored = (labels != -100) & _valid_tokens(labels, attention_mask)
    if torch.equal(labels[scored], input_ids[scored]) or not bool(scored[:, :-1].any()):
        return
    if torch.equal(labels[:, :-1][scored[:, :-1]], input_ids[:, 1:][scored[:, :-1]]):
        raise ValueError(
            "labels are input_ids shifted by one, as for next-token prediction: this model compares labels with the "
            "token at the same position. Pass labels=input_ids, with -100 for context."
        )


def may_read(device: torch.device, may_synchronize: bool | None = None) -> bool:
    """Return whether values may be read back, by default only on a CPU, where reading does not wait for a device."""
    # A value that is read during tracing would hold for all inputs of the trace.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and (device.type == "cpu" if may_synchronize is None else may_synchronize)


def padding_mask(attention_mask: torch.Tensor | None, may_synchronize: bool | None = None) -> torch.Tensor | None:
    """Return None instead of a mask of ones, if it may be read: without padding, all rows share faster masks."""
    if attention_mask is not None and may_read(attention_mask.device, may_synchronize) and bool(attention_mask.all()):
        return None
    return attention_mask


def _valid_tokens(like: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    return torch.ones_like(like, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


class Layout(NamedTuple):
    """Positions, blocks, padding and documents of a stream. Blocks are counted from each row's first real token."""

    position_ids: torch.Tensor  # (batch or 1, length), rotary positions
    block_ids: torch.Tensor  # (batch or 1, length), the index of each token's block in its row
    valid: torch.Tensor | None  # bool (batch, length), False for padding; None when nothing is padded
    document_ids: torch.Tensor | None = None  # (batch or 1, length), of packed documents, which see only themselves

    # Methods rather than properties, which torch before 2.11 cannot compile in a named tuple.
    def is_aligned(self) -> bool:
        """Return whether the blocks of all rows begin at the same columns, multiples of the block size."""
        return self.valid is None and self.document_ids is None

    def num_rows(self) -> int:
        """Return the rows of an attention mask: 1 if all rows of the batch share it."""
        return self.block_ids.shape[0] if self.valid is None else self.valid.shape[0]

    def repeat_rows(self, times: int) -> "Layout":
        """Return the layout of a batch in which each row is repeated; a field of one row still applies to all."""
        fields: Any = self
        return Layout(*(f if f is None or f.shape[0] == 1 else f.repeat_interleave(times, dim=0) for f in fields))


def token_layout(
    attention_mask: torch.Tensor | None,
    length: int,
    block_size: int,
    *,
    past: int = 0,
    device: torch.device,
    position_ids: torch.Tensor | None = None,
) -> Layout:
    """Return the layout of `past + length` tokens.

    Args:
        attention_mask: `(batch, past + length)`, ones for tokens and zeros for padding on either side. A row gets the
            positions and blocks that it would have alone.
        position_ids: `(batch or 1, length)`. Wherever a position is not its predecessor plus one, a new document
            begins, which has its own blocks and does not see the others.

    Raises:
        ValueError: if the positions do not fit the tokens, a document does not begin at position 0, or packed
            documents follow a cache, whose documents are not known.
    """
    attention_mask = padding_mask(attention_mask)
    valid = None if attention_mask is None else attention_mask.bool()
    if valid is None:
        own = torch.arange(past + length, device=device).unsqueeze(0)
    else:
        own = (valid.cumsum(1) - 1).clamp(min=0)
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != length):
        raise ValueError(f"position_ids of shape {tuple(position_ids.shape)}: give (batch or 1, {length}).")
    # Training has no cache, and must not wait for the device to learn that there is only one document.
    reads = may_read(device, True if past else None)
    if position_ids is not None and not (reads and _equal_where_valid(position_ids, own[:, past:], valid)):
        if past:
            raise ValueError("position_ids of several documents exclude a cache: pass the documents separately.")
        return _packed_layout(position_ids, block_size, valid)
    return Layout(own, own // block_size, valid)


def _equal_where_valid(position_ids: torch.Tensor, own: torch.Tensor, valid: torch.Tensor | None) -> bool:
    """Return whether the given positions are those that each row has by default."""
    same = position_ids == own
    return bool((same if valid is None else same | ~valid[:, -same.shape[1] :]).all())


def _packed_layout(position_ids: torch.Tensor, block_size: int, valid: torch.Tensor | None) -> Layout:
    """Return the layout of documents side by side, each with its own positions."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if may_read(position_ids.device):
        _document_starts(position_ids, valid)
    begins_block = begins | (position_ids % block_size == 0)
    if valid is not None:
        begins_block = begins_block & valid  # padding begins no block
    block_ids = (begins_block.cumsum(1) - 1).clamp(min=0)
    return Layout(position_ids, block_ids, valid, begins.cumsum(1).expand_as(block_ids))


def _document_starts(position_ids: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Find the first token of each document, bool `(batch, length)`; refuse one that is not at position 0."""
    valid = torch.ones_like(position_ids, dtype=torch.bool) if valid is None else valid
    begins = valid.clone()
    # A token begins a document after padding, or where its position does not follow the one before.
    begins[:, 1:] &= ~valid[:, :-1] | (position_ids[:, 1:] != position_ids[:, :-1] + 1)
    starts = position_ids.expand(begins.shape)[begins]
    wrong = starts[starts != 0]
    if wrong.numel():
        raise ValueError(
            f"position_ids begin a document at position {int(wrong[0])}: count the tokens of each document from 0, or "
            f"leave position_ids out."
        )
    return begins


class NetworkInputs(NamedTuple):
    """The checked inputs of one call of a network."""

    embeds: torch.Tensor  # (batch, length, hidden_size), of x_t, or of the text if there is one stream
    layout: Layout  # of the cached and the given tokens
    cache: StepCache | None
    past: int  # tokens in the cache


def read_inputs(
    network: Any,
    *,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    clean_input_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool | None = None,
    inputs_embeds: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **unknown: Any,
) -> NetworkInputs:
    """Check the arguments of a forward pass without labels, embed its tokens and open its cache.

    Raises:
        ValueError: if arguments exclude one another, are unknown, or do not fit the network.
    """
    config = network.config
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds.")
    check_arguments(network, unknown, position_ids)
    check_token_ids(input_ids, config.vocab_size, "input_ids")
    check_token_ids(clean_input_ids, config.vocab_size, "clean_input_ids")
    embeds = inputs_embeds if input_ids is None else network.get_input_embeddings()(input_ids)
    assert embeds is not None  # one of them is given
    length, size = embeds.shape[1], config.block_size
    cache, past = open_cache(past_key_values, use_cache, length, attention_mask, size, training=network.training)
    if cache is not None and not torch.compiler.is_compiling():
        if past:
            check_rows(cache.cache, len(embeds), config)
        if cache.num_committed:
            note_tokens(cache.cache, input_ids, past)
    if clean_input_ids is not None and (cache is not None or clean_input_ids.shape != embeds.shape[:2]):
        raise ValueError(
            f"clean_input_ids of shape {tuple(clean_input_ids.shape)} must have the shape of the noisy input, "
            f"{tuple(embeds.shape[:2])}, and no cache: x_0 itself is the context."
        )
    check_attention_mask(attention_mask, (embeds.shape[0], past + length))
    if clean_input_ids is None and cache is None:
        check_caller(config, input_ids, attention_mask)
        if input_ids is not None and not config.causal:
            warn_of_visible_tokens(network, input_ids, attention_mask, config.mask_token_id)
    # A causal model accepts any positions after a cache: those of a window that has moved are not counted from 0.
    packed = None if config.causal and past else position_ids
    layout = token_layout(attention_mask, length, size, past=past, device=embeds.device, position_ids=packed)
    return NetworkInputs(embeds, layout, cache, past)


class Documents(NamedTuple):
    """Packed documents as separate rows, padded on the right."""

    index: torch.Tensor  # type: ignore[assignment]  # (documents, longest), flat index of each token in the packed batch
    mask: torch.Tensor  # bool (documents, longest), False for padding

    def split(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids, labels and attention mask of the documents, `(documents, longest)`."""
        ids, labels = (packed.flatten()[self.index] for packed in (input_ids, labels))
        return ids.masked_fill(~self.mask, 0), labels.masked_fill(~self.mask, -100), self.mask

    def join(self, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return values of documents `(documents, longest)` at their packed positions, zero elsewhere."""
        joined = values.new_zeros(shape.numel())
        joined[self.index[self.mask]] = values[self.mask]
        return joined.view(shape)


def check_positions(position_ids: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse positions of another shape than the tokens; a single row of them applies to all rows.

    Raises:
        ValueError: if the shape is neither `(batch, length)` nor `(1, length)`.
    """
    if position_ids is not None and tuple(position_ids.shape) not in (tuple(shape), (1, shape[1])):
        raise ValueError(f"position_ids of shape {tuple(position_ids.shape)} do not fit tokens of {tuple(shape)}.")


def find_documents(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, shape: torch.Size
) -> Documents | None:
    """Find the documents packed into each row, as in padding-free batches: one begins wherever positions restart.

    A loss draws a noise level for each block of each document, so it separates the documents. This waits for the
    device once.

    Returns:
        None if no row holds more than one document.

    Raises:
        ValueError: if the positions do not fit the batch, or a document does not begin at position 0.
    """
    if position_ids is None:
        return None
    check_positions(position_ids, shape)
    position_ids = position_ids.expand(shape)
    real = _valid_tokens(position_ids, attention_mask)
    begins = _document_starts(position_ids, real)
    if int(begins.sum(1).max()) <= 1:
        return None
    packed = real.flatten().nonzero().squeeze(1)  # flat indices of all tokens
    # The index of a document is the number of documents that begin before it.
    document = (begins.flatten().cumsum(0) - 1)[packed]
    column = position_ids.flatten()[packed]
    size = (int(document[-1]) + 1, int(column.max()) + 1)
    index = torch.zeros(size, dtype=torch.long, device=packed.device)
    mask = torch.zeros(size, dtype=torch.bool, device=packed.device)
    index[document, column] = packed
    mask[document, column] = True
    return Documents(index, mask)
