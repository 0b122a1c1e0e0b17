"""Generate the samples of a job, and write each to the terminal or a file as soon as it is finished.

Also fill gaps in texts, and chat in a terminal.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from bd3lm_hf.checkpoints import check_generates, how_to_adapt, window_of
from bd3lm_hf.console import load_model_and_tokenizer, progress_bar
from bd3lm_hf.generation.denoising_trace import trace_document, traced_sample, write_trace
from bd3lm_hf.generation.generate_cli import (
    FIELDS,
    check_chat_arguments,
    generation_fields,
    plan,
    read_prompts,
)
from bd3lm_hf.generation.text_generation import SamplesFile, generate_batch, sample_row, sample_seeds
from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.tokenization import encode_prompt
from bd3lm_hf.user_files import lock_output


# Some versions of transformers do not have it; a terminal then shows finished tokens only.
_DRAFT_STREAMER: type[TextStreamer] = getattr(transformers, "TextDiffusionStreamer", TextStreamer)

#: Printed between texts on standard output, because a text can contain newlines.
SEPARATOR = "-" * 8


def run(arguments: argparse.Namespace) -> None:
    """Run `bd3lm generate`."""
    if arguments.chat:
        check_chat_arguments(arguments)
        model, tokenizer = load_model_and_tokenizer(arguments)
        check_generates(model, arguments.model)
        streamer = _streamer(tokenizer, skip_prompt=True)
        converse(model, tokenizer, generation_fields(arguments), seed=arguments.seed, streamer=streamer)
        return
    prompts = plan(arguments)
    write_samples(arguments, prompts, *load_model_and_tokenizer(arguments))


def write_samples(
    arguments: argparse.Namespace, prompts: list[str | None], model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Generate the samples that are not finished yet; an interrupt keeps finished ones.

    Args:
        prompts: the prompt of each sample.
    """
    check_generates(model, arguments.model)
    if arguments.trace and not hasattr(model.generation_config, "output_trace"):
        raise ValueError(f"--trace shows denoising steps; a {type(model).__name__} does not have them: leave it out.")
    settings = {"model": arguments.model, "seed": arguments.seed, **generation_fields(arguments)}
    output = arguments.output
    with contextlib.nullcontext() if output is None else lock_output(output, "--output"):
        file = None if output is None else SamplesFile(output, prompts, settings, overwrite=arguments.overwrite)
        if file and arguments.trace and not file.missing():
            raise ValueError(f"--trace: all samples are already in {output}, so there is nothing to trace.")
        traced: list[dict[str, Any]] = []
        try:
            _generate_all(arguments, prompts, settings, file, traced, model, tokenizer)
        except KeyboardInterrupt:
            if file is not None:
                kept = len(prompts) - len(file.missing())
                print(f"interrupted: {kept} of {len(prompts)} samples are in {output}", file=sys.stderr)
            raise
        finally:
            if traced:
                _write_traces(arguments, model, tokenizer, traced)


def _generate_all(
    arguments: argparse.Namespace,
    prompts: list[str | None],
    settings: dict[str, Any],
    file: SamplesFile | None,
    traced: list[dict[str, Any]],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoded = {prompt: _encode(prompt, model, tokenizer) for prompt in dict.fromkeys(prompts)}
    indices = list(range(len(prompts))) if file is None else file.indices
    seeds = sample_seeds(arguments.seed, prompts, indices)
    prompt_of = dict(enumerate(prompts)) if file is None else file.missing()
    missing, count = list(prompt_of), len(prompts)
    kept = count - len(missing)
    # Printing a text shows the bar again, which only a terminal can remove.
    is_hidden = arguments.stream or len(missing) <= arguments.batch_size or (file is None and not sys.stderr.isatty())
    with progress_bar("generating", count, initial=kept, disable=is_hidden) as bar:
        for begin in range(0, len(missing), arguments.batch_size):
            batch = missing[begin : begin + arguments.batch_size]
            if arguments.stream and batch[0] > 0:
                print(SEPARATOR)
            texts = generate_batch(
                model,
                [encoded[prompt_of[index]] for index in batch],
                seeds=[seeds[index] for index in batch],
                stop_at_eos=True,
                keep_steps=bool(arguments.trace),
                streamer=_streamer(tokenizer) if arguments.stream else None,
                **generation_fields(arguments),
            )
            rows = []
            for index, text in zip(batch, texts, strict=True):
                about: dict[str, Any] = {"index": index, "prompt": prompt_of[index]}
                rows.append(sample_row(text, tokenizer, **about, settings=settings))
                if arguments.trace:
                    traced.append(traced_sample(tokenizer, text, **about, mask_token_id=model.config.mask_token_id))
            if file is not None:
                file.append(rows)
            elif not arguments.stream:
                for row in rows:
                    separator = f"{SEPARATOR}\n" if row["index"] else ""
                    bar.write(separator + row["text"], file=sys.stdout)
            bar.update(len(batch))
    if file is not None:
        print(f"{count} samples in {file.path}" + (f", {kept} from an earlier run" if kept else ""))


def _encode(prompt: str | None, model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a prompt: the BOS token for an absent one."""
    if prompt is None:
        begin = model.generation_config.bos_token_id
        if begin is None:
            raise ValueError("the model has no bos_token_id to start a text from: give a --prompt.")
        return [begin]
    ids = encode_prompt(prompt, tokenizer)
    # Our own models warn and read the end of a longer prompt, or refuse it themselves.
    window = math.inf if hasattr(model, "token_nll") else window_of(model)
    if len(ids) > window:
        raise ValueError(
            f"a prompt has {len(ids)} tokens, more than the model's window of {window} tokens: shorten it "
            f"({prompt[:40]!r} ...)."
        )
    return ids


def _streamer(tokenizer: PreTrainedTokenizerBase, *, skip_prompt: bool = False) -> TextStreamer:
    # Drafts are overwritten in place, which only a terminal supports.
    kind = _DRAFT_STREAMER if sys.stdout.isatty() else TextStreamer
    return kind(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)


def _write_traces(
    arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase, traced: list[dict[str, Any]]
) -> None:
    shown = {name: value for name, value in generation_fields(arguments).items() if name in FIELDS}
    document = trace_document(
        tokenizer,
        traced,
        model=Path(arguments.model).name,
        sampler=arguments.sampler or model.generation_config.sampler,
        settings={**shown, "do_sample": arguments.do_sample, "seed": arguments.seed},
        mask_token_id=model.config.mask_token_id,
        block_size=model.config.block_size,
    )
    for path in arguments.trace:
        write_trace(document, path)


# Gaps


def run_infill(arguments: argparse.Namespace) -> None:
    """Fill the gaps of texts with tokens: `bd3lm infill --model DIR --text "The quick ___ fox"`."""
    if not arguments.gap:
        raise ValueError("--gap '' would match between any two characters: give the text that marks a gap.")
    texts = read_prompts(arguments.text, arguments.text_file, flag="--text")
    if texts == [None]:
        raise ValueError("nothing to fill: give a --text with gaps, or a --text-file.")
    model, tokenizer = load_model_and_tokenizer(arguments)
    if not hasattr(model, "infill"):
        is_ours = hasattr(model, "token_nll")
        remedy = "Name a block-diffusion model." if is_ours else how_to_adapt(arguments.model)
        raise ValueError(f"--model {arguments.model} is a {type(model).__name__}, which cannot fill gaps. {remedy}")
    encoded = [_encode_gaps(str(text), arguments, model, tokenizer) for text in texts]
    fields = generation_fields(arguments)
    for number, ids in enumerate(encoded):
        if number:
            print(SEPARATOR)
        generator = torch.Generator().manual_seed(derived_seed(arguments.seed, number))
        input_ids = torch.tensor([ids], device=model.device)
        filled = model.infill(input_ids, torch.ones_like(input_ids), generator=generator, **fields)
        print(tokenizer.decode(filled[0], skip_special_tokens=True))


def _encode_gaps(text: str, arguments: argparse.Namespace, model: Any, tokenizer: Any) -> list[int]:
    gap = tokenizer.mask_token * arguments.gap_tokens
    ids = list(tokenizer(text.replace(tokenizer.mask_token, arguments.gap).replace(arguments.gap, gap))["input_ids"])
    if model.config.mask_token_id not in ids:
        raise ValueError(f"the text {text[:40]!r} has no gap: write {arguments.gap!r} where tokens are missing.")
    return ids


# Conversations


#: Commands that a user can type instead of a message.
RESET, END = "/reset", "/exit"


def converse(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    generation: Mapping[str, Any],
    *,
    seed: int = 0,
    streamer: Any = None,
) -> list[dict[str, str]]:
    """Answer the lines of standard input until it ends, and return the messages.

    `/reset` forgets the conversation so far, `/exit` ends it.

    Args:
        generation: arguments of `generate`.
        streamer: shows each answer as it is generated.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"--chat needs a chat template, which the tokenizer {tokenizer.name_or_path!r} does not have: set "
            f"tokenizer.chat_template and save it, or give a --prompt."
        )
    set_seed(seed)
    messages: list[dict[str, str]] = []
    for line in _lines():
        if line == RESET:
            messages.clear()
            continue
        messages.append({"role": "user", "content": line})
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids: torch.Tensor = encoded["input_ids"].to(model.device)
        sequences = model.generate(ids, streamer=streamer, **generation)
        answer = str(tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True)).strip()
        messages.append({"role": "assistant", "content": answer})
    return messages


def _lines() -> Iterator[str]:
    """Yield the user's messages; print a prompt for each if standard input is a terminal."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"Type a message; {RESET} starts over, {END} or Ctrl-D quits.", file=sys.stderr)
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == END:
            return
        if line.strip():
            yield line.strip()
