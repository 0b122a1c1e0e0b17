"""Write the trace of a generated text as data or as a page: the reverse process, one step per forward pass.

A trace (`trace.json`, and embedded in `trace.html`) is one JSON object:

- `format`: `"bd3lm-trace"`; `version`: 1; `model`, `sampler`: names to show; `settings`: generation settings;
  `block_size`; `mask_token_id`;
- `vocabulary`: token id (a string, as JSON requires) -> text, for ids that were revealed and later masked again;
- `quantiles`: deciles of the probabilities of all revealed tokens, from minimum to maximum;
- `samples`: a list of objects with
    - `index`, `prompt` (null if there is none), `num_prompt_tokens`, `num_tokens` (new ones), `forwards` (forward
      passes that revealed a token of this sample), `tokens_per_forward`;
    - `ids`: all tokens of the text, the prompt's first; a *position* counts these from 0;
    - `texts`: the characters that each token adds; null for tokens that only form a character together;
    - `characters`: `[start, stop, text]` of each such group of tokens; `special`: positions of special tokens;
    - `blocks`: `[start, stop]` positions of each block's new tokens;
    - `opening`: the step that the page shows first, counted from 1;
    - `steps`: each has the number of its `block`, and `changes`. If `forward` is true, the changes are the tokens
      that a forward pass revealed, `[position, id, confidence]` with the probability of each. If it is false, they
      are the positions that a corrector masked again before the next forward pass, `[position, null, null]`.

Before the first step all new tokens are masked; after the last step every position has its id from `ids`.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bd3lm_hf.user_files import write_atomically


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bd3lm_hf.generation.text_generation import GeneratedText


FORMAT = "bd3lm-trace"
VERSION = 1

#: File name endings that a trace can be written to.
ENDINGS = (".html", ".json")

# What an incomplete character decodes to.
_REPLACEMENT = "�"

# In tokens: UTF-8 needs at most four bytes, and a token has at least one.
_LONGEST_CHARACTER = 4


class RowStep(NamedTuple):
    """One sample's part of a denoising step."""

    block: int  # the same for all steps of a block
    positions: Sequence[int]  # of the block's tokens; negative: outside the text
    tokens: Sequence[int]  # after the step, including mask tokens
    confidence: Sequence[float | None]  # probability of each token that this step revealed, None for the others


def row_steps(trace: Iterable[Any], row: int, offset: int) -> Iterator[RowStep]:
    """Yield one row of the `TraceStep`s that `generate(output_trace=True)` returns.

    Args:
        offset: column of `sequences` where the row's text begins, after its padding.
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
    """The characters that each token adds to a text."""

    texts: list[str | None]  # None: part of a character
    characters: list[tuple[int, int, str]]  # start, stop and text of each character that several tokens form


def pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> Pieces:
    """Split the decoded text among its tokens; joined in order, the pieces are the text.

    Each token is decoded together with the one before it, so spaces come out as in the whole text. Tokens that form a
    character together (bytes of a byte-level vocabulary) stay together; bytes that form no character become one
    replacement character each.
    """
    texts: list[str | None] = []
    characters: list[tuple[int, int, str]] = []
    context = start = 0  # the first token to decode, and the first that is not split yet
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
        # The token after bytes that form no character is decoded without them: they would swallow its bytes.
        context, start = stop if broken else start, stop
    return Pieces(texts, characters)


def traced_sample(
    tokenizer: "PreTrainedTokenizerBase",
    text: "GeneratedText",
    *,
    index: int,
    prompt: str | None,
    mask_token_id: int,
) -> dict[str, Any]:
    """Return one entry of `samples`, without tokens that the steps revealed after the EOS token of the text."""
    # The token at each new position.
    state = dict.fromkeys(range(text.num_given, len(text.ids)), mask_token_id)
    recorded, blocks = _replay(text.steps, state, mask_token_id)
    assert list(state.values()) == text.new_ids, "the steps are those of another text"
    forwards = sum(step["forward"] for step in recorded)
    split = pieces(tokenizer, text.ids)
    special = set(tokenizer.all_special_ids)
    return {
        "index": index,
        "prompt": prompt,
        "num_prompt_tokens": text.num_given,
        "num_tokens": len(text.new_ids),
        "forwards": forwards,
        "tokens_per_forward": len(text.new_ids) / max(1, forwards),
        "ids": text.ids,
        "texts": split.texts,
        "characters": [list(character) for character in split.characters],
        "special": [position for position, token in enumerate(text.ids) if token in special],
        "blocks": [[positions[0], positions[-1] + 1] for positions in blocks],
        "opening": opening_step([step["block"] for step in recorded]),
        "steps": recorded,
    }


def _replay(
    steps: Iterable[RowStep], state: dict[int, int], mask_token_id: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Apply all steps to `state`, and return them as `samples` has them, and the new positions of each block."""
    blocks: dict[int, list[int]] = {}
    owner: dict[int, int] = {}  # the block that wrote each position
    recorded: list[dict[str, Any]] = []
    for step in steps:
        # The first block that writes a position owns it: overlapping windows show it again, unchanged.
        entries = (entry for entry in zip(*step[1:], strict=True) if entry[0] in state)
        inside = [entry for entry in entries if owner.setdefault(entry[0], step.block) == step.block]
        if not inside:
            continue  # this row has ended, but other rows of the batch have not
        blocks.setdefault(step.block, [position for position, _, _ in inside])
        # A position that had a token, and now is masked or revealed again, was masked in between.
        masked: list[list[Any]] = [
            [position, None, None]
            for position, token, confidence in inside
            if state[position] != mask_token_id and (token == mask_token_id or confidence is not None)
        ]
        shown: list[list[Any]] = [[p, token, round(value, 6)] for p, token, value in inside if value is not None]
        state.update({position: mask_token_id for position, _, _ in masked})
        state.update({position: token for position, token, _ in shown})
        for changes, forward in ((masked, False), (shown, True)):
            if changes:
                recorded.append({"block": len(blocks) - 1, "forward": forward, "changes": changes})
    return recorded, list(blocks.values())


def opening_step(blocks: Sequence[int]) -> int:
    """Return the step nearest to the middle that leaves its block partly masked, or the last one.

    Such a step shows finished text, a partly denoised block and masks at once.

    Args:
        blocks: block number of each step.
    """
    last = len(blocks)
    partly = (step for step in range(1, last) if blocks[step] == blocks[step - 1])
    return min(partly, key=lambda step: abs(2 * step - last), default=last)


# The document and its page


def trace_document(
    tokenizer: "PreTrainedTokenizerBase",
    samples: Sequence[dict[str, Any]],
    *,
    model: str,
    sampler: str,
    settings: dict[str, Any],
    mask_token_id: int,
    block_size: int,
) -> dict[str, Any]:
    """Return a whole trace as described at the top of this file."""
    masked_again, probabilities = set(), []
    for sample in samples:
        for step in sample["steps"]:
            masked_again |= {token for at, token, _ in step["changes"] if token not in (None, sample["ids"][at])}
            probabilities += [probability for *_, probability in step["changes"] if probability is not None]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "sampler": sampler,
        "settings": settings,
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "vocabulary": {str(token): _decode(tokenizer, [token]) for token in sorted(masked_again)},
        "quantiles": _deciles(probabilities),
        "samples": list(samples),
    }


def _deciles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [0.0, 1.0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return [round(value, 6) for value in (min(values), *cuts, max(values))]


def trace_page(document: dict[str, Any]) -> str:
    """Return the trace as a self-contained page: no network, no other files."""
    template = resources.files("bd3lm_hf.generation").joinpath("denoising_trace.html").read_text(encoding="utf-8")
    data = json.dumps(document, allow_nan=False)  # ASCII, so line separators are escaped too
    # The text of a token must not end the element that holds the data, or begin a comment in it.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.replace("@TRACE@", data)


def write_trace(document: dict[str, Any], path: Path) -> None:
    """Write a page (`.html`), or else the data (`.json`)."""
    is_page = path.suffix.lower() == ENDINGS[0]
    write_atomically(path, trace_page(document) if is_page else json.dumps(document, allow_nan=False) + "\n")


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
