"""`bd3lm infill`: replace the gaps in texts. Imports nothing slow."""

import argparse
from collections.abc import Sequence
from typing import Any

from bd3lm_hf.argument_parser import add_model_arguments, integer, load_model_and_tokenizer
from bd3lm_hf.generation.generate_cli import FIELDS, add_do_sample, add_sampling
from bd3lm_hf.generation.samples import read_prompts
from bd3lm_hf.seeds import derived_seed


#: Fields without a meaning for gaps, whose lengths and ends are given.
_FIELDS = [name for name in FIELDS if name not in ("window_stride", "entropy_stop", "entropy_stop_window", "max_time")]
_CHOICES = ("sampler", "sampling_dtype")


def add_arguments(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the flags of `bd3lm infill`."""
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text", action="append", help="text with gaps; may be repeated; - reads lines of standard input"
    )
    source.add_argument("--text-file", help="a text per line, or a .jsonl file with `prompt` in every object")
    parser.add_argument("--gap", default="___", help="how a gap is written (___); the mask token is one too")
    parser.add_argument("--gap-tokens", type=integer(1), default=1, help="tokens that fill a gap (1)")
    how = parser.add_argument_group("how to fill")
    add_do_sample(how)
    add_sampling(how, _FIELDS)


def run(arguments: argparse.Namespace) -> None:
    """Fill the gaps of texts with tokens: `bd3lm infill --model DIR --text "The quick ___ fox"`."""
    texts = read_prompts(arguments.text, arguments.text_file, flag="--text")
    if texts == [None]:
        raise ValueError("name what to fill: a --text with gaps, or a --text-file.")
    model, tokenizer = load_model_and_tokenizer(arguments)
    if not hasattr(model, "infill"):
        from bd3lm_hf.checkpoints import how_to_adapt

        is_ours = hasattr(model, "token_nll")
        remedy = "Name a block-diffusion model." if is_ours else how_to_adapt(arguments.model)
        raise ValueError(f"--model {arguments.model} is a {type(model).__name__}, which fills no gaps. {remedy}")
    encoded = [_encode(str(text), arguments, model, tokenizer) for text in texts]
    fields = {name: getattr(arguments, name) for name in ("do_sample", *_CHOICES, *_FIELDS)}
    fields = {name: value for name, value in fields.items() if value is not None}
    from bd3lm_hf.generation.write_samples import SEPARATOR

    for number, ids in enumerate(encoded):
        if number:
            print(SEPARATOR)
        print(tokenizer.decode(_infill(model, ids, number, arguments.seed, fields), skip_special_tokens=True))


def _encode(text: str, arguments: argparse.Namespace, model: Any, tokenizer: Any) -> list[int]:
    gap = tokenizer.mask_token * arguments.gap_tokens
    ids = list(tokenizer(text.replace(tokenizer.mask_token, arguments.gap).replace(arguments.gap, gap))["input_ids"])
    if model.config.mask_token_id not in ids:
        raise ValueError(f"the text {text[:40]!r} has no gap: write {arguments.gap!r} where tokens are missing.")
    window = model.config.model_length
    if len(ids) > window:
        raise ValueError(f"a text has {len(ids)} tokens, more than the model's window of {window} tokens: shorten it.")
    return ids


def _infill(model: Any, ids: list[int], number: int, seed: int, fields: dict[str, Any]) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(derived_seed(seed, number))
    input_ids = torch.tensor([ids], device=model.device)
    filled = model.infill(input_ids, torch.ones_like(input_ids), generator=generator, **fields)
    return filled[0].tolist()
