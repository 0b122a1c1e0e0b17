"""How a text was written, as data and as a page: the reverse process of block diffusion, one step per forward pass.

A trace (`trace.json`, and embedded in `trace.html`) is one JSON object:

- `format`: `"bd3lm-trace"`; `version`: 1; `model`, `sampler`: names to show; `settings`: fields of the generation;
  `block_size`; `mask_token_id`;
- `vocabulary`: token id (a string, as JSON has it) -> text, of the ids that were written and taken back;
- `samples`: a list of objects with
    - `index`, `prompt` (null: none was given), `num_prompt_tokens`, `num_tokens` (new ones), `forwards` (passes that
      this sample took part in), `tokens_per_forward`;
    - `ids`: all tokens of the text, the prompt's first; a *position* counts these from 0;
    - `texts`: what each of them adds to the text; null for tokens that form a character only together;
    - `characters`: `[start, stop, text]` of such tokens; `special`: positions of special tokens;
    - `blocks`: `[start, stop]` positions of each block's new tokens;
    - `steps`: each has the number of its `block`, and `changes`. A step with `forward` true is a pass of the network
      and what it revealed, `[position, id, confidence]` with the probability of each token. One with `forward` false
      is what a corrector masked again before the next pass, `[position, null, null]`.

Before the first step all new tokens are masked; after the last one every position holds its id in `ids`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase


FORMAT = "bd3lm-trace"


VERSION = 1


#: File name endings that a trace can be written to.
ENDINGS = (".html", ".json")


#: What an incomplete character decodes to.
_REPLACEMENT = "�"


#: UTF-8 needs at most so many bytes, and a token has at least one.
_LONGEST_CHARACTER = 4


class RowStep(NamedTuple):
    """One sample's part of a denoising step."""

    block: int  # a number that the steps of a block share
    positions: Sequence[int]  # of the block's places; negative: outside the text
    tokens: Sequence[int]  # after the step, mask tokens included
    confidence: Sequence[float | None]  # probability of each token that was revealed in this step, None for others


def row_steps(trace: Iterable[Any], row: int, offset: int) -> Iterator[RowStep]:
    """One row of the `TraceStep`s that `generate(output_trace=True)` returns.

    Args:
        offset: column of `sequences` where the row's text begins, behind its padding.
    """
    for step in trace:
        shown = zip(step.revealed[row].tolist(), step.confidence[row].tolist(), strict=True)
        yield RowStep(
            block=step.block,
            positions=[column - offset for column in step.columns[row].tolist()],
            tokens=step.tokens[row].tolist(),
            confidence=[confidence if revealed else None for revealed, confidence in shown],
        )


class Pieces(NamedTuple):
    """What each token adds to a text."""

    texts: list[str | None]  # None: a part of a character
    characters: list[tuple[int, int, str]]  # start, stop and text of the characters that several tokens form


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Pieces:
    """Split the decoded text among its tokens; joined in order, the pieces are the text.

    A token is decoded behind the one before it, so that spaces come out as in the whole text. Tokens that hold parts
    of a character (bytes of a byte-level vocabulary) stay together until it is complete; bytes that form no character
    are replacement characters one by one.
    """
    texts: list[str | None] = []
    characters: list[tuple[int, int, str]] = []
    context = start = 0  # of the tokens that are decoded, and of those that are not yet split
    while start < len(ids):
        before = _decode(tokenizer, ids[context:start])
        for stop in range(start + 1, min(start + _LONGEST_CHARACTER, len(ids)) + 1):
            text = _decode(tokenizer, ids[context:stop])[len(before) :]
            if text and not text.endswith(_REPLACEMENT):
                break
        broken = _REPLACEMENT in text or not text
        if broken:
            stop, text = start + 1, _decode(tokenizer, ids[start : start + 1])
        if stop - start == 1:
            texts.append(text)
        else:
            texts += [None] * (stop - start)
            characters.append((start, stop, text))
        # Behind bytes that form no character the next token is decoded alone, as they would swallow its own bytes.
        context, start = stop if broken else start, stop
    return Pieces(texts, characters)


def traced_sample(
    tokenizer: PreTrainedTokenizerBase,
    *,
    index: int,
    prompt: str | None,
    prompt_ids: Sequence[int],
    new_ids: Sequence[int],
    steps: Iterable[RowStep],
    mask_token_id: int,
) -> dict[str, Any]:
    """One entry of `samples`; what the steps wrote behind the end of the text (behind its EOS token) is left out.

    Raises:
        ValueError: the steps do not end at `new_ids`.
    """
    ids = [*prompt_ids, *new_ids]
    first, holds = len(prompt_ids), dict.fromkeys(range(len(prompt_ids), len(ids)), mask_token_id)
    blocks: dict[int, list[int]] = {}  # new positions of each block
    owner: dict[int, int] = {}  # the block that wrote each position; windows that overlap hold some again
    told: list[dict[str, Any]] = []
    for step in steps:
        entries = (entry for entry in zip(*step[1:], strict=True) if entry[0] in holds)
        inside = [entry for entry in entries if owner.setdefault(entry[0], step.block) == step.block]
        if not inside:
            continue  # the row has ended, others of the batch go on
        blocks.setdefault(step.block, [position for position, _, _ in inside])
        # What is masked now, or revealed now, and held a token before, was masked in between.
        masked: list[list[Any]] = [
            [position, None, None]
            for position, token, confidence in inside
            if holds[position] != mask_token_id and (token == mask_token_id or confidence is not None)
        ]
        shown: list[list[Any]] = [[p, token, round(value, 6)] for p, token, value in inside if value is not None]
        holds.update({position: mask_token_id for position, _, _ in masked})
        holds.update({position: token for position, token, _ in shown})
        for changes, forward in ((masked, False), (shown, True)):
            if changes:
                told.append({"block": len(blocks) - 1, "forward": forward, "changes": changes})
    if list(holds.values()) != list(new_ids):
        wrong = next(position for position, token in holds.items() if token != ids[position])
        raise ValueError(
            f"the trace of sample {index} holds the token {holds[wrong]} at position {wrong} where the text has "
            f"{ids[wrong]}: give the steps and the text of one call."
        )
    forwards = sum(step["forward"] for step in told)
    split = pieces(tokenizer, ids)
    special = set(tokenizer.all_special_ids)
    return {
        "index": index,
        "prompt": prompt,
        "num_prompt_tokens": first,
        "num_tokens": len(new_ids),
        "forwards": forwards,
        "tokens_per_forward": len(new_ids) / max(1, forwards),
        "ids": ids,
        "texts": split.texts,
        "characters": [list(character) for character in split.characters],
        "special": [position for position, token in enumerate(ids) if token in special],
        "blocks": [[places[0], places[-1] + 1] for places in blocks.values()],
        "steps": told,
    }


def trace_document(
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[dict[str, Any]],
    *,
    model: str,
    sampler: str,
    settings: dict[str, Any],
    mask_token_id: int,
    block_size: int,
) -> dict[str, Any]:
    """A whole trace, see the head of this file.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("a trace needs at least one sample.")
    taken_back = set()
    for sample in samples:
        for step in sample["steps"]:
            taken_back |= {token for at, token, _ in step["changes"] if token not in (None, sample["ids"][at])}
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "sampler": sampler,
        "settings": settings,
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "vocabulary": {str(token): _decode(tokenizer, [token]) for token in sorted(taken_back)},
        "samples": list(samples),
    }


def trace_page(document: dict[str, Any]) -> str:
    """The trace as one page that needs nothing else: no network, no other file."""
    template = resources.files("bd3lm_hf.generation").joinpath("denoising_trace.html").read_text(encoding="utf-8")
    data = json.dumps(document, allow_nan=False)  # ASCII, so that line separators are escaped as well
    # No text of a token may end the element that holds the data, or begin a comment in it.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.replace("@TRACE@", data)


def write_trace(document: dict[str, Any], path: Path) -> None:
    """Write a page (`.html`) or the data (`.json`).

    Raises:
        ValueError: a file name that says neither.
    """
    check_ending(path)
    page = path.suffix.lower() == ENDINGS[0]
    text = trace_page(document) if page else json.dumps(document, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")


def check_ending(path: Path) -> None:
    """Refuse a file name that says neither page nor data."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"a trace is a page (.html) or data (.json), which the name {path.name!r} does not say.")


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


__all__ = [
    "ENDINGS",
    "FORMAT",
    "Pieces",
    "RowStep",
    "VERSION",
    "check_ending",
    "pieces",
    "row_steps",
    "trace_document",
    "trace_page",
    "traced_sample",
    "write_trace",
]
