"""Texts written for a person or a file: `bd3lm generate`, from prompts to samples, streams and traces."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TextStreamer

from bd3lm_hf.generation.chat import converse
from bd3lm_hf.generation.denoising_trace import (
    RowStep,
    check_ending,
    row_steps,
    trace_document,
    traced_sample,
    write_trace,
)
from bd3lm_hf.generation.samples import Sample, SamplesFile, read_prompts
from bd3lm_hf.modeling.generation_ssdlm import CONTEXTS
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS, SAMPLING_DTYPES, SCORE_SAMPLERS
from bd3lm_hf.modeling.simplex_ssdlm import PROJECTIONS
from bd3lm_hf.output_files import check_output_file
from bd3lm_hf.seeds import derived_seed


def whole_number(least: int) -> Callable[[str], int]:
    """A type of argument: whole numbers of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} does not do: give a whole number of at least {least}")
        return value

    return read


def number(most: float = math.inf, *, least_included: bool = False) -> Callable[[str], float]:
    """A type of argument: numbers above 0 (or from 0 on) and at most `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= most or (value == 0 and not least_included):
            limits = f"{'of at least' if least_included else 'above'} 0"
            limits += f" and at most {most:g}" if math.isfinite(most) else ""
            raise argparse.ArgumentTypeError(f"{text!r} does not do: give a number {limits}")
        return value

    return read


#: Fields of the generation config that have a flag: type and help.
FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "num_denoising_steps": (whole_number(1), "steps of a block; by default as many as the sampler needs"),
    "confidence_threshold": (number(1, least_included=True), "confidence: reveals what is more probable; 1: singly"),
    "entropy_bound": (number(least_included=True), "entropy_bound: nats of doubt that a step may reveal"),
    "remask_fraction": (number(1, least_included=True), "share of a block that is masked and written once more"),
    "window_stride": (whole_number(1), "MDLM, SEDD: tokens by which a full window moves on; by default half of it"),
    "temperature": (number(), "divides the logits; below 1 sharpens the choice"),
    "top_k": (whole_number(0), "choose among so many of the likeliest tokens; 0: all"),
    "top_p": (number(1), "choose among the likeliest tokens that together reach this probability"),
    "nucleus_p": (number(1), "the paper's nucleus, which drops the token that crosses p; the paper uses 0.9"),
    "repetition_penalty": (number(), "above 1 discourages tokens that occurred"),
    "entropy_stop": (number(), "ends a text whose last tokens have a lower entropy in nats; the paper has 4"),
    "entropy_stop_window": (whole_number(1), "how many tokens that looks at"),
    "max_time": (number(), "seconds after which a batch ends with the block it is in"),
}


#: Fields with a flag that names a choice.
CHOICES = ("sampler", "sampling_dtype", "context", "projection")


_OWN_CHOICES = ("max_new_tokens", "do_sample", "stop_at_second_eos")


_BATCH_SIZE = 8


# Not in every version of transformers; without it a terminal shows finished tokens only.
_DRAFTS: type[TextStreamer] = getattr(transformers, "TextDiffusionStreamer", TextStreamer)


@dataclass(frozen=True)
class Job:
    """What `bd3lm generate` was asked for."""

    model: str
    prompts: list[str | None]  # None: write from nothing
    num_samples: int  # per prompt
    batch_size: int
    seed: int
    generation: dict[str, Any] = field(default_factory=dict)  # arguments of `generate`
    stream: bool = False
    output: Path | None = None
    overwrite: bool = False
    traces: list[Path] = field(default_factory=list)

    @property
    def sample_prompts(self) -> list[str | None]:
        """The prompt of each sample: the samples of a prompt behind one another."""
        return [prompt for prompt in self.prompts for _ in range(self.num_samples)]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the texts, beside the prompts themselves."""
        own = {"num_prompts": len(self.prompts), "num_samples": self.num_samples, "batch_size": self.batch_size}
        return {"model": self.model, "seed": self.seed, **own, **self.generation}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bd3lm generate`, without those that every verb has."""
    what = parser.add_argument_group("what to write")
    source = what.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", help="text to continue; may be repeated; - reads lines of standard input"
    )
    source.add_argument("--chat", action="store_true", help="answer messages typed in a terminal, until Ctrl-D")
    source.add_argument("--prompt-file", help="a prompt per line, or a .jsonl file with `prompt` in every object")
    what.add_argument("--num-samples", type=whole_number(1), default=1, help="texts per prompt, or from nothing")
    what.add_argument("--max-new-tokens", type=whole_number(1), default=64)
    what.add_argument(
        "--batch-size",
        type=whole_number(1),
        help=f"texts written at once ({_BATCH_SIZE}, or 1 with --stream). A text depends on the seed, its number and "
        f"the size of its batch; with 1, on the seed and its number alone",
    )
    how = parser.add_argument_group("how to write")
    choice = how.add_mutually_exclusive_group()
    choice.add_argument("--do-sample", action="store_true", default=True, help="draw tokens (default)")
    choice.add_argument("--greedy", dest="do_sample", action="store_false", help="take the most likely token")
    add_sampling(how, FIELDS)
    how.add_argument(
        "--stop-at-second-eos",
        action="store_true",
        default=None,
        help="the paper's rule: end with the second end token",
    )
    where = parser.add_argument_group("where it goes")
    where.add_argument("--stream", action="store_true", help="show each text while it is written")
    where.add_argument(
        "--output", type=Path, help="samples file, a JSON object per line; a rerun continues behind what is there"
    )
    where.add_argument("--overwrite", action="store_true", help="replace the samples file")
    where.add_argument(
        "--trace", type=Path, action="append", help="page (.html) or data (.json) that replays every denoising step"
    )


def add_sampling(how: Any, fields: Iterable[str]) -> None:
    """The flags of a parser or group that decide how a text is written: choices by name, and these of `FIELDS`."""
    how.add_argument("--sampler", choices=(*SAMPLERS, *SCORE_SAMPLERS), help="which masked positions to reveal when")
    how.add_argument("--sampling-dtype", choices=tuple(SAMPLING_DTYPES), help="precision that tokens are drawn with")
    how.add_argument("--context", choices=tuple(CONTEXTS), help="simplex diffusion: what a block is written behind")
    how.add_argument("--projection", choices=tuple(PROJECTIONS), help="simplex diffusion: what a step makes of logits")
    for name in fields:
        kind, text = FIELDS[name]
        how.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def plan(arguments: argparse.Namespace) -> Job:
    """Read the prompts and refuse what can not be done, before a model is loaded.

    Raises:
        ValueError: names the argument and the remedy.
    """
    if arguments.stream and (arguments.batch_size or 1) > 1:
        raise ValueError(f"--stream shows one text at a time: leave --batch-size {arguments.batch_size} out.")
    if arguments.overwrite and arguments.output is None:
        raise ValueError("--overwrite replaces a samples file: name it with --output.")
    for path in arguments.trace or ():
        check_ending(path)
        check_output_file(path, "--trace")
    if arguments.output is not None:
        check_output_file(arguments.output, "--output")
    return Job(
        model=arguments.model,
        prompts=read_prompts(arguments.prompt, arguments.prompt_file),
        num_samples=arguments.num_samples,
        batch_size=arguments.batch_size or (1 if arguments.stream else _BATCH_SIZE),
        seed=arguments.seed,
        generation=_generation_fields(arguments),
        stream=arguments.stream,
        output=arguments.output,
        overwrite=arguments.overwrite,
        traces=arguments.trace or [],
    )


def _generation_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `generate` that were given."""
    chosen = {name: getattr(arguments, name) for name in (*_OWN_CHOICES, *CHOICES, *FIELDS)}
    return {name: value for name, value in chosen.items() if value is not None}


def check_chat_arguments(arguments: argparse.Namespace) -> None:
    """Refuse flags that mean nothing in a conversation.

    Raises:
        ValueError: if such a flag is given; the message names it.
    """
    given = {
        "--num-samples": arguments.num_samples != 1,
        "--batch-size": arguments.batch_size is not None,
        "--output": arguments.output is not None,
        "--overwrite": arguments.overwrite,
        "--trace": bool(arguments.trace),
    }
    if unfit := [name for name, is_given in given.items() if is_given]:
        raise ValueError(f"--chat shows one answer after the other: leave out {', '.join(unfit)}.")


def hold_conversation(arguments: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Answer the messages of standard input, see [`converse`]."""
    kind = _DRAFTS if _is_terminal(sys.stdout) else TextStreamer
    streamer = kind(tokenizer, skip_prompt=True, skip_special_tokens=True)
    converse(model, tokenizer, _generation_fields(arguments), seed=arguments.seed, streamer=streamer)


def write(job: Job, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all samples of a job that are not finished yet; those that are finished stay when it is interrupted.

    Raises:
        ValueError: a prompt too long for the model, a trace of a model that does not denoise, or a samples file that
            does not belong to this job.
    """
    if job.traces and not hasattr(model.generation_config, "output_trace"):
        raise ValueError(f"--trace shows denoising steps, which a {type(model).__name__} does not take: leave it out.")
    ids, prompts = _encode(job, model, tokenizer), job.sample_prompts
    file = None
    if job.output is not None:
        file = SamplesFile(job.output, prompts, job.settings, overwrite=job.overwrite)
    before = set(file.finished) if file else set()
    if job.traces and len(before) == len(ids):
        raise ValueError(f"--trace: all samples are in {job.output} already, so there is nothing to trace.")
    batches = [range(begin, min(begin + job.batch_size, len(ids))) for begin in range(0, len(ids), job.batch_size)]
    traced: list[dict[str, Any]] = []
    shown = _is_terminal(sys.stderr) and not job.stream and len(batches) > 1
    bar = tqdm(total=len(ids), initial=len(before), desc="writing", unit="text", disable=not shown, leave=False)
    try:
        with bar:
            for batch in batches:
                if before.issuperset(batch):
                    continue
                written = _write_batch(job, batch[0], [ids[index] for index in batch], model, tokenizer)
                samples = [
                    _sample(job, index, prompts[index], text, tokenizer)
                    for index, text in zip(batch, written, strict=True)
                ]
                if job.traces:
                    traced += [_traced(*pair, model, tokenizer) for pair in zip(samples, written, strict=True)]
                if file is not None:
                    file.append(samples)
                elif not job.stream:
                    for sample in samples:
                        tqdm.write(sample.text, file=sys.stdout)
                bar.update(len(batch) - len(before.intersection(batch)))
    except KeyboardInterrupt:
        if file is not None:
            print(f"interrupted: {len(file.finished)} of {len(ids)} samples are in {job.output}", file=sys.stderr)
        raise
    finally:
        if traced:
            _write_traces(job, model, tokenizer, traced)
    if file is not None:
        print(f"{len(ids)} samples in {job.output}" + (f", {len(before)} of an earlier run" if before else ""))


def _encode(job: Job, model: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompt of each sample as token ids; without a prompt the token that begins a text."""
    limit = model.config.model_length
    encoded: list[list[int]] = []
    for prompt in job.prompts:
        if prompt is None:
            begin = model.generation_config.bos_token_id
            if begin is None:
                raise ValueError("the model has no bos_token_id to start a text from: give a --prompt.")
            ids = [begin]
        else:
            ids = list(tokenizer(prompt)["input_ids"])
        if len(ids) > limit:
            raise ValueError(
                f"a prompt has {len(ids)} tokens, more than the model's window of {limit} tokens: shorten it "
                f"({str(prompt)[:40]!r} ...)."
            )
        encoded += [ids] * job.num_samples
    return encoded


class _Written(NamedTuple):
    """One row of a batch."""

    prompt_ids: list[int]
    new_ids: list[int]
    forwards: int | None  # of the batch
    seconds: float  # a share of those of the batch
    steps: list[RowStep]  # as far as they are traced


def _write_batch(
    job: Job, first: int, ids: list[list[int]], model: Any, tokenizer: PreTrainedTokenizerBase
) -> list[_Written]:
    """Write the samples from number `first` on, whose prompts are `ids`."""
    padded = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    # All draws of the batch come from the seed and the number of its first sample.
    torch.manual_seed(derived_seed(job.seed, first))
    started = time.perf_counter()
    output = model.generate(
        input_ids=padded["input_ids"],
        attention_mask=padded["attention_mask"],
        return_dict_in_generate=True,
        streamer=_streamer(tokenizer) if job.stream else None,
        **({"output_trace": True} if job.traces else {}),
        **job.generation,
    )
    seconds = (time.perf_counter() - started) / len(ids)
    width = padded["input_ids"].shape[1]
    return [
        _Written(
            prompt_ids,
            new_tokens(output.sequences[row, width:].tolist(), model.generation_config),
            output.get("num_forward_passes"),
            seconds,
            list(row_steps(output.trace, row, width - len(prompt_ids))) if job.traces else [],
        )
        for row, prompt_ids in enumerate(ids)
    ]


def _sample(job: Job, index: int, prompt: str | None, written: _Written, tokenizer: PreTrainedTokenizerBase) -> Sample:
    count, forwards = len(written.new_ids), written.forwards
    return Sample(
        index=index,
        prompt=prompt,
        text=str(tokenizer.decode(written.prompt_ids + written.new_ids, skip_special_tokens=True)),
        num_prompt_tokens=len(written.prompt_ids),
        num_tokens=count,
        seed=job.seed,
        forwards=forwards,
        tokens_per_forward=None if forwards is None else count / max(1, forwards),
        seconds=written.seconds,
        model=job.model,
        settings=job.settings,
    )


def _traced(sample: Sample, written: _Written, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return traced_sample(
        tokenizer,
        index=sample.index,
        prompt=sample.prompt,
        prompt_ids=written.prompt_ids,
        new_ids=written.new_ids,
        steps=written.steps,
        mask_token_id=model.config.mask_token_id,
    )


def new_tokens(row: list[int], config: Any) -> list[int]:
    """A row's new tokens without the padding behind its end."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    padding = ends[0] if config.pad_token_id is None else config.pad_token_id
    count = len(row)
    while count and row[count - 1] == padding:
        count -= 1
    if padding in ends and count < len(row):
        count += 1  # the first one of them ended the text
    return row[:count]


def _streamer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    """Drafts are overwritten in place, which only a terminal can do."""
    kind = _DRAFTS if _is_terminal(sys.stdout) else TextStreamer
    return kind(tokenizer, skip_special_tokens=True)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


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


__all__ = [
    "CHOICES",
    "FIELDS",
    "Job",
    "add_arguments",
    "add_sampling",
    "new_tokens",
    "number",
    "plan",
    "whole_number",
    "write",
]
