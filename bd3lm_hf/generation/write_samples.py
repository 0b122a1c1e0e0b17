"""Generate the samples of a job, and write each to the terminal or a file as soon as it is finished.

Also fill gaps in texts, and chat in a terminal.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from bd3lm_hf.argument_parser import load_model_and_tokenizer
from bd3lm_hf.checkpoints import check_generates, how_to_adapt, window_of
from bd3lm_hf.generation.denoising_trace import trace_document, traced_sample, write_trace
from bd3lm_hf.generation.generate_cli import (
    FIELDS,
    INFILL_CHOICES,
    INFILL_FIELDS,
    Job,
    check_chat_arguments,
    generation_fields,
    plan,
    read_prompts,
)
from bd3lm_hf.generation.text_generation import (
    GeneratedText,
    Sample,
    SamplesFile,
    generate_batch,
    open_samples,
    sample_seeds,
)
from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.tokenization import encode_prompt


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
    job = plan(arguments)
    write_samples(job, *load_model_and_tokenizer(arguments))


def write_samples(job: Job, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Generate the samples of a job that are not finished yet; an interrupt keeps finished ones."""
    check_generates(model, job.model)
    if job.traces and not hasattr(model.generation_config, "output_trace"):
        raise ValueError(f"--trace shows denoising steps; a {type(model).__name__} does not have them: leave it out.")
    encoded = _encode(job, model, tokenizer)
    with contextlib.ExitStack() as stack:
        file = None
        if job.output is not None:
            opened = open_samples(job.output, job.sample_prompts, job.settings, overwrite=job.overwrite)
            file = stack.enter_context(opened)
        if file and job.traces and not file.missing():
            raise ValueError(f"--trace: all samples are already in {job.output}, so there is nothing to trace.")
        traced: list[dict[str, Any]] = []
        try:
            _generate_all(job, encoded, file, traced, model, tokenizer)
        except KeyboardInterrupt:
            if file is not None:
                count = len(job.sample_prompts)
                print(
                    f"interrupted: {count - len(file.missing())} of {count} samples are in {job.output}",
                    file=sys.stderr,
                )
            raise
        finally:
            if traced:
                _write_traces(job, model, tokenizer, traced)


def _generate_all(
    job: Job,
    encoded: dict[str | None, list[int]],
    file: SamplesFile | None,
    traced: list[dict[str, Any]],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    indices = list(range(len(job.sample_prompts))) if file is None else file.indices
    seeds = sample_seeds(job.seed, job.sample_prompts, indices)
    prompts = dict(enumerate(job.sample_prompts)) if file is None else file.missing()
    missing, count = list(prompts), len(job.sample_prompts)
    kept = count - len(missing)
    is_shown = sys.stderr.isatty() and not job.stream and len(missing) > job.batch_size
    with tqdm(total=count, initial=kept, desc="generating", unit="text", disable=not is_shown, leave=False) as bar:
        for begin in range(0, len(missing), job.batch_size):
            batch = missing[begin : begin + job.batch_size]
            if job.stream and batch[0] > 0:
                print(SEPARATOR)
            texts = generate_batch(
                model,
                [encoded[prompts[index]] for index in batch],
                seeds=[seeds[index] for index in batch],
                stop_at_eos=True,
                keep_steps=bool(job.traces),
                streamer=_streamer(tokenizer) if job.stream else None,
                **job.generation,
            )
            samples = [
                Sample.of(text, tokenizer, index=index, prompt=prompts[index], settings=job.settings)
                for index, text in zip(batch, texts, strict=True)
            ]
            if job.traces:
                traced += [_traced(*pair, model, tokenizer) for pair in zip(samples, texts, strict=True)]
            if file is not None:
                file.append(samples)
            elif not job.stream:
                for sample in samples:
                    separator = f"{SEPARATOR}\n" if sample.index else ""
                    tqdm.write(separator + sample.text, file=sys.stdout)
            bar.update(len(batch))
    if file is not None:
        print(f"{count} samples in {job.output}" + (f", {kept} from an earlier run" if kept else ""))


def _encode(job: Job, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str | None, list[int]]:
    """Return the token ids of each prompt: the BOS token for an absent prompt."""
    # Our own models warn and read the end of a longer prompt, or refuse it themselves.
    window = math.inf if hasattr(model, "token_nll") else window_of(model)
    encoded: dict[str | None, list[int]] = {}
    for prompt in job.prompts:
        if prompt is None:
            begin = model.generation_config.bos_token_id
            if begin is None:
                raise ValueError("the model has no bos_token_id to start a text from: give a --prompt.")
            ids = [begin]
        else:
            ids = encode_prompt(prompt, tokenizer)
        if len(ids) > window:
            raise ValueError(
                f"a prompt has {len(ids)} tokens, more than the model's window of {window} tokens: shorten it "
                f"({str(prompt)[:40]!r} ...)."
            )
        encoded[prompt] = ids
    return encoded


def _traced(sample: Sample, text: GeneratedText, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return traced_sample(
        tokenizer,
        index=sample.index,
        prompt=sample.prompt,
        prompt_ids=text.ids[: text.num_given],
        new_ids=text.new_ids,
        steps=text.steps,
        mask_token_id=model.config.mask_token_id,
    )


def _streamer(tokenizer: PreTrainedTokenizerBase, *, skip_prompt: bool = False) -> TextStreamer:
    # Drafts are overwritten in place, which only a terminal supports.
    kind = _DRAFT_STREAMER if sys.stdout.isatty() else TextStreamer
    return kind(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)


def _write_traces(job: Job, model: Any, tokenizer: PreTrainedTokenizerBase, traced: list[dict[str, Any]]) -> None:
    shown = {name: value for name, value in job.generation.items() if name in FIELDS}
    document = trace_document(
        tokenizer,
        traced,
        model=Path(job.model).name,
        sampler=job.generation.get("sampler") or model.generation_config.sampler,
        settings={**shown, "do_sample": job.generation["do_sample"], "seed": job.seed},
        mask_token_id=model.config.mask_token_id,
        block_size=model.config.block_size,
    )
    for path in job.traces:
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
    fields = {name: getattr(arguments, name) for name in ("do_sample", *INFILL_CHOICES, *INFILL_FIELDS)}
    fields = {name: value for name, value in fields.items() if value is not None}
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
    window = model.config.model_length
    if len(ids) > window:
        raise ValueError(f"a text has {len(ids)} tokens, more than the model's window of {window} tokens: shorten it.")
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
    stdin: TextIO | None = None,
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
    for line in _lines(stdin or sys.stdin):
        if line == RESET:
            messages.clear()
            continue
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": _answer(model, tokenizer, messages, generation, streamer)})
    return messages


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    generation: Mapping[str, Any],
    streamer: Any,
) -> str:
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids: torch.Tensor = encoded["input_ids"].to(model.device)
    sequences = model.generate(ids, streamer=streamer, **generation)
    return str(tokenizer.decode(sequences[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _lines(stdin: TextIO) -> Iterator[str]:
    """Yield the user's messages; print a prompt for each if standard input is a terminal."""
    is_terminal = stdin.isatty()
    if is_terminal:
        print(f"Type a message; {RESET} starts over, {END} or Ctrl-D quits.", file=sys.stderr)
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = stdin.readline()
        if not line or line.strip() == END:
            return
        if line.strip():
            yield line.strip()
