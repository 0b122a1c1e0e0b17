"""A tokenizer for text from others: a literal mask token in it stays text, since blanks are known by position."""

from typing import Any

import torch
from transformers import BatchEncoding


# Arguments of `apply_chat_template` about tokenization, which is done here.
_OF_TOKENIZATION = ("tokenize", "return_tensors", "return_dict", "load_audio_from_video")


class PlainText:
    """A tokenizer with the calls that transformers' handlers make.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer_of_model, self._mask = tokenizer, getattr(tokenizer, "mask_token", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer_of_model, name)

    def __call__(self, text: str, *, add_special_tokens: bool = True, **kwargs: Any) -> BatchEncoding:
        """Return `input_ids` and `attention_mask`, `(1, length)`.

        Raises:
            ValueError: if the text has no tokens, or half of a surrogate pair.
        """
        text.encode()  # a tokenizer calls such a text by another type
        if self._mask and self._mask in text:
            ids = self._with_literal_masks(text, add_special_tokens)
        else:
            ids = self._tokenizer_of_model(text, add_special_tokens=add_special_tokens)["input_ids"]
        if not ids:
            raise ValueError("the prompt has no tokens: send some text.")
        data = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return BatchEncoding(data)

    def _with_literal_masks(self, text: str, add_special_tokens: bool) -> list[int]:
        encode = self._tokenizer_of_model
        literal = encode(self._mask, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        parts = [encode(part, add_special_tokens=False)["input_ids"] for part in text.split(self._mask)]
        ids: list[int] = parts[0] + [token for part in parts[1:] for token in literal + part]
        if not add_special_tokens:
            return ids
        # The special tokens that this tokenizer puts around a text.
        example = encode("x", add_special_tokens=False)["input_ids"]
        framed: list[int] = encode("x")["input_ids"]
        at = next(at for at in range(len(framed)) if framed[at : at + len(example)] == example)
        return framed[:at] + ids + framed[at + len(example) :]

    def apply_chat_template(self, conversation: list[dict], **kwargs: Any) -> BatchEncoding:
        """Return the ids of a conversation in the model's chat format."""
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_TOKENIZATION}
        text = self._tokenizer_of_model.apply_chat_template(conversation, tokenize=False, **kwargs)
        return self(text, add_special_tokens=False)
