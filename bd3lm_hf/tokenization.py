"""Load or train a tokenizer, which always has a mask token.

The mask id M (paper, section 3) must not occur in text. A tokenizer that has a mask token keeps it; any other gets one
after its last id: for GPT-2, M = 50257 in a vocabulary of 50258, as in the published checkpoints.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


if TYPE_CHECKING:
    from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig

_Tokenizer = TypeVar("_Tokenizer", bound=PreTrainedTokenizerBase)

#: Name that, like None, means a tokenizer trained on the corpus.
TRAIN = "train"

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
MASK = "<|mask|>"

#: The 256 bytes, end of text, padding and mask, which every byte-level tokenizer has.
SMALLEST_VOCABULARY = 256 + 3

_MAX_TEMPLATE = 1_000_000
# The code of a template without the text around it, and in that code a number of seven digits or more, or a power.
_TEMPLATE_CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_HUGE = re.compile(r"\d{7,}|\*\*")

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"),
    "sentencepiece.bpe.model",
)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer; for one without, transformers makes an empty tokenizer."""
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def load_tokenizer(
    name_or_path: str | None = None, *, texts: Iterable[str] | None = None, vocab_size: int = 4096
) -> PreTrainedTokenizerBase:
    """Load or train a tokenizer that has begin, end, padding and mask tokens and pads on the left.

    Args:
        name_or_path: a folder or hub name; None or "train" trains a tokenizer on `texts`.
        texts: the corpus to train on; read only when training.
        vocab_size: tokens of a trained tokenizer, including special tokens (a small corpus can yield fewer).

    Returns:
        The tokenizer. If it is loaded, `complete_special_tokens` adds missing tokens.

    Raises:
        ValueError: if there are no texts to train on, the vocabulary is too small, the folder has no tokenizer, or the
            name is unknown.
    """
    if name_or_path is None or name_or_path == TRAIN:
        if texts is None:
            raise ValueError("A tokenizer cannot be trained without a corpus: pass texts=..., or name a tokenizer.")
        return train_tokenizer(texts, vocab_size=vocab_size)
    if Path(name_or_path).is_dir() and not has_tokenizer(Path(name_or_path)):
        raise ValueError(
            f"The folder {name_or_path!r} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); "
            "save the tokenizer there with tokenizer.save_pretrained, or name another tokenizer."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        limit = tokenizer.model_max_length
        if not isinstance(limit, (int, float)) or isinstance(limit, bool):
            raise ValueError(f"model_max_length={limit!r} is not a number of tokens")
    except Exception as error:  # a damaged file makes the libraries raise nearly anything
        raise ValueError(
            f"Cannot load the tokenizer {name_or_path!r}, neither from a folder nor from the hub (which needs a "
            f"network connection). Name a folder, or {TRAIN!r} to train one on the corpus. The reason: {error}"
        ) from error
    _check_chat_templates(tokenizer, name_or_path)
    if tokenizer.mask_token is None:
        from bd3lm_hf.foreign_layouts import read_contract_config  # imports all decoders

        config = read_contract_config(name_or_path)
        if config is not None:
            set_mask_token(tokenizer, config.mask_token_id)  # it belongs to a published decoder of another project
    return complete_special_tokens(tokenizer)


def _check_chat_templates(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a chat template with numbers or powers that could fill the memory, such as '%1000000000d'."""
    templates = tokenizer.chat_template or ""
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if not isinstance(template, str):
            raise ValueError(f"The chat template of {name!r} is a {type(template).__name__}, not a text: replace it.")
        code = " ".join(_TEMPLATE_CODE.findall(template))
        found = None if len(template) > _MAX_TEMPLATE else _HUGE.search(code)
        if len(template) > _MAX_TEMPLATE or found:
            reason = repr(found[0]) if found else f"{len(template):,} characters"
            raise ValueError(f"The chat template of {name!r} has {reason}, which no conversation needs: replace it.")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text survives a round trip, and the same texts give the same tokenizer.

    BOS and EOS are the same token, as in GPT-2. It separates the documents of packed text, so the model also sees it
    before each document, and generation without a prompt can start from it. The mask token has the last id.

    Args:
        texts: the corpus, read once.
        vocab_size: number of tokens, including special tokens.

    Raises:
        ValueError: if `vocab_size` is too small for the bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {SMALLEST_VOCABULARY} tokens "
            "(256 bytes, end of text, padding, mask)."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the mask follows
        min_frequency=2,
        special_tokens=[END_OF_TEXT, PADDING],
        # Sorted, because the order of a set differs between processes, and the ids would differ with it.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    return complete_special_tokens(tokenizer)


# Make a tokenizer fit a model


def complete_special_tokens(tokenizer: _Tokenizer) -> _Tokenizer:
    """Add missing special tokens to the tokenizer, in place, and make it pad on the left, as `generate` requires.

    - begin and end: the classifier and separator tokens if it has them (BERT), else the one of the two that exists;
    - mask: a new token after the last id;
    - padding: the end token, which keeps the vocabulary at its published size. Padding is never the mask token, even
      if the tokenizer defines it so: code that infers padding from ids would treat masked positions as padding.

    Raises:
        ValueError: if the tokenizer has no token that could end a text.
    """
    begin = tokenizer.bos_token or tokenizer.cls_token or tokenizer.eos_token
    end = tokenizer.eos_token or tokenizer.sep_token or tokenizer.bos_token
    if begin is None or end is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no token that ends a text; set tokenizer.eos_token, save "
            "it, and name its folder."
        )
    if tokenizer.bos_token is None:
        tokenizer.bos_token = begin
    if tokenizer.eos_token is None:
        tokenizer.eos_token = end
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if tokenizer.pad_token in (None, tokenizer.mask_token):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def set_mask_token(tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> None:
    """Make the token of this id the mask token of a tokenizer, in place; add one if the id is the next free one.

    Raises:
        ValueError: if the id is neither.
    """
    free = first_free_id(tokenizer)
    known = tokenizer.convert_ids_to_tokens(mask_token_id) if mask_token_id < free else None
    if tokenizer.mask_token_id != mask_token_id:
        tokenizer.add_special_tokens({"mask_token": MASK if known is None else str(known)})
    if tokenizer.mask_token_id != mask_token_id:
        raise ValueError(
            f"mask_token_id={mask_token_id} is neither a token of the tokenizer nor its next free id, {free}: leave "
            f"it out, or use the tokenizer that the model came with."
        )


def first_free_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id after the largest one; not the number of tokens, because a vocabulary can have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a text of any length, without adding special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """Return the token ids of a text to continue, without the end token that some tokenizers (BERT) add."""
    ids = list(tokenizer(text, **options)["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        return ids
    plain = encode_plain(text, tokenizer)  # ends with that token only if the text itself does
    return ids[:-1] if plain and ids[:-1][-len(plain) :] == plain else ids


def limit_to_window(tokenizer: PreTrainedTokenizerBase, config: "BD3LMConfig") -> None:
    """Set `model_max_length` to the model's window, so `truncation=True` cuts to it (also in pipelines)."""
    tokenizer.model_max_length = config.model_length


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, config: "BD3LMConfig") -> None:
    """Check that the tokenizer's ids mean the same to the model.

    Raises:
        ValueError: if the model has fewer token ids than the tokenizer, or another mask id.
    """
    largest = first_free_id(tokenizer) - 1
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer has token ids up to {largest}, but the model's vocab_size is {config.vocab_size}: set "
            f"vocab_size to {largest + 1} or more, or use the model's own tokenizer."
        )
    mask_id = cast(int, config.mask_token_id)  # every configuration sets one
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id != mask_id:
        raise ValueError(
            f"The model's mask_token_id is {mask_id}, but the tokenizer's mask token {tokenizer.mask_token!r} has id "
            f"{tokenizer.mask_token_id}: set mask_token_id={tokenizer.mask_token_id} for a new model, or use the "
            "tokenizer that a trained model came with."
        )
    token = tokenizer.convert_ids_to_tokens(mask_id) if mask_id <= largest else None
    if token is not None and token not in (tokenizer.mask_token, tokenizer.pad_token):
        raise ValueError(
            f"The model's mask_token_id {mask_id} is the ordinary token {token!r} of the tokenizer: give the model a "
            f"mask id after the tokenizer's last id ({largest}), or load the tokenizer with load_tokenizer, which "
            "adds a mask token."
        )
