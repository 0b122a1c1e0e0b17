"""Tiny random decoders of every family."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bd3lm_hf.modeling.modeling_bd3lm_decoders import DECODERS


MASK, LENGTH, BLOCK = 63, 12, 4

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GPT2_SIZES = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 8, "sliding_window": 64},
    "granite": {"logits_scaling": 2.0},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
}
_DROPOUT = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)

FAMILIES = tuple(DECODERS)

#: Ids of the tokenizer of a saved decoder. Words are called `w3` to `w59` by their ids; later rows are free.
END, USER, ASSISTANT = 0, 1, 2
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}<|end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def stock_fields(family: str) -> dict[str, Any]:
    """Return the fields of a tiny stock configuration."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {**_GPT2_SIZES, **_DROPOUT} if family == "gpt2" else {**SIZES, **_OF_FAMILY.get(family, {})}
    return sizes | special


def tiny_stock(family: str, **fields: Any) -> Any:
    """Return a stock language model with weights large enough to matter, in evaluation mode."""
    stock_class = DECODERS[family].__bases__[-1]
    model = stock_class(stock_class.config_class(**stock_fields(family) | fields))
    return _randomize(model)


def tiny_decoder(family: str, attention: str = "sdpa", **fields: Any) -> Any:
    """Return a block-diffusion model over a decoder of a family, in evaluation mode."""
    model_class = DECODERS[family]
    config = model_class.config_class(
        **stock_fields(family) | {"mask_token_id": MASK, "block_size": BLOCK, "model_length": 32, **fields}
    )
    return _randomize(model_class._from_config(config, attn_implementation=attention))


def save_stock(family: str, folder: Path, **fields: Any) -> Path:
    """Save a tiny stock decoder with a tokenizer that has a chat template and no mask token."""
    words = {"<|end|>": END, "user": USER, "assistant": ASSISTANT, **{f"w{number}": number for number in range(3, 60)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=_TEMPLATE)
    tokenizer.save_pretrained(folder)
    tiny_stock(family, bos_token_id=None, eos_token_id=END, pad_token_id=None, **fields).save_pretrained(folder)
    return folder


def random_ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Return ordinary tokens `(rows, length)`."""
    return torch.randint(3, MASK - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


def masked(ids: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Return tokens with some masked."""
    uniform = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(uniform < 0.5, MASK)


def _randomize(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
