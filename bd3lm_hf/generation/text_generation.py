"""Generate text with one seed per row, and save it in a samples file that a later run can continue.

A row gives the same text alone and in a batch. `generate_batch` is the only wrapper around `model.generate`: the
generate command, generative evaluation, quality curves, model comparison and samples during training all call it.
"""

import contextlib
import itertools
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bd3lm_hf.generation.denoising_trace import RowStep, row_steps
from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.user_files import JsonLinesFile


class GeneratedText(NamedTuple):
    """A prompt and its continuation, with the cost of generating it."""

    ids: list[int]
    num_given: int  # tokens of the prompt
    forwards: int = 0  # forward passes that this row took part in, as many as when it is generated alone
    batch_forwards: int = 0  # forward passes of the whole batch, which runs until its slowest row ends
    seconds: float = 0.0  # this row's share of the batch's time
    steps: Sequence[RowStep] = ()  # empty unless requested

    @property
    def new_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.ids[self.num_given :]


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    seeds: Sequence[int],
    stop_at_eos: bool = False,
    keep_steps: bool = False,
    one_by_one: bool = True,
    **generation: Any,
) -> list[GeneratedText]:
    """Continue each prompt by `max_new_tokens` tokens; apart from rounding, a row does not depend on its batch.

    A model that samples a whole batch from a single generator continues its prompts one by one, unless it is greedy.
    The global random state is left unchanged.

    Args:
        prompts: token ids.
        seeds: one seed per prompt.
        stop_at_eos: end a text at an end token; otherwise it is a token like any other, as in packed training text.
        keep_steps: return every denoising step.
        one_by_one: False lets a model with a single generator sample the batch together, from the first seed: faster,
            but a row then depends on its batch.
        generation: arguments of `generate`.
    """
    has_row_generators = getattr(model, "generator_per_row", False)  # plain decoders do not have this attribute
    if one_by_one and len(prompts) > 1 and not has_row_generators and generation.get("do_sample"):
        options = {"stop_at_eos": stop_at_eos, "keep_steps": keep_steps, **generation}
        rows = zip(prompts, seeds, strict=True)
        return [generate_batch(model, [ids], max_new_tokens, seeds=[seed], **options)[0] for ids, seed in rows]
    inputs = pad_left(prompts, model.device, model.generation_config.pad_token_id or 0)
    if has_row_generators:
        generation["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    if keep_steps:
        generation["output_trace"] = True
    started = time.perf_counter()
    devices = [model.device] if model.device.type == "cuda" else []
    with _eos_disabled(model.generation_config, not stop_at_eos), torch.random.fork_rng(devices):
        torch.manual_seed(seeds[0])
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **generation)
    seconds = (time.perf_counter() - started) / len(prompts)
    width = inputs["input_ids"].shape[1]
    block_size = getattr(model.config, "block_size", 1)  # plain decoders do not have it
    texts = []
    for row, (prompt, ids) in enumerate(zip(prompts, output.sequences.tolist(), strict=True)):
        new_ids = without_padding(ids[width:], model.generation_config) if stop_at_eos else ids[width:]
        forwards, batch_forwards = _count_forwards(output, row, len(new_ids), len(ids) - width, block_size)
        steps = list(row_steps(output.trace, row, width - len(prompt))) if keep_steps else []
        texts.append(GeneratedText([*prompt, *new_ids], len(prompt), forwards, batch_forwards, seconds, steps))
    return texts


def generate_texts(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, *, batch_size: int, seed: int, **generation: Any
) -> list[GeneratedText]:
    """Continue each prompt, in batches of [`generate_batch`]; the seed of a text follows from `seed` and its index."""
    seeds = [derived_seed(seed, index) for index in range(len(prompts))]
    texts: list[GeneratedText] = []
    for first in range(0, len(prompts), batch_size):
        batch = slice(first, first + batch_size)
        texts += generate_batch(model, prompts[batch], new_tokens, seeds=seeds[batch], **generation)
    return texts


def without_padding(new_ids: list[int], config: Any) -> list[int]:
    """Return a row's new tokens without the padding after its end."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    padding = ends[0] if config.pad_token_id is None else config.pad_token_id
    count = len(new_ids)
    while count and new_ids[count - 1] == padding:
        count -= 1
    # If padding is an end token too, the first one ended the text, unless another end token did.
    if padding in ends and count < len(new_ids) and not (count and new_ids[count - 1] in ends):
        count += 1
    return new_ids[:count]


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device, padding: int = 0) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, both `(batch, length of the longest prompt)`.

    The attention mask hides the padding, so any id of the vocabulary will do.
    """
    width = max(map(len, prompts))
    ids = [[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _count_forwards(output: Any, row: int, num_new: int, num_columns: int, block_size: int) -> tuple[int, int]:
    """Return the number of forward passes of a row, and of its batch, whose longest row has `num_columns` tokens."""
    # A plain decoder reports no count: it takes one forward pass per token.
    in_batch = output.get("num_forward_passes") or num_columns
    if output.get("row_forward_passes") is not None:
        return int(output.row_forward_passes[row]), in_batch
    # Every block takes the same number of forward passes.
    return in_batch * -(-num_new // block_size) // max(1, -(-num_columns // block_size)), in_batch


@contextlib.contextmanager
def _eos_disabled(config: Any, disabled: bool) -> Iterator[None]:
    # Passing `eos_token_id=None` is not enough: `generate` takes None from the model's own generation config.
    eos_token_id = config.eos_token_id
    if disabled:
        config.eos_token_id = None
    try:
        yield
    finally:
        config.eos_token_id = eos_token_id


# Files of samples


def sample_row(
    text: GeneratedText, tokenizer: Any, *, index: int, prompt: str | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe a generated text: a line of the samples file.

    Args:
        index: position in the numbering of the file.
        prompt: None if there is none.
        settings: everything that determines the text apart from the prompt, including its `model` and `seed`.
    """
    num_tokens = len(text.new_ids)
    return {
        "index": index,
        "prompt": prompt,
        "text": tokenizer.decode(text.ids, skip_special_tokens=True),  # including the prompt
        "num_prompt_tokens": text.num_given,
        "num_tokens": num_tokens,  # new tokens, including an end token
        "seed": settings["seed"],
        "forwards": text.forwards,
        "batch_forwards": text.batch_forwards,
        "tokens_per_forward": num_tokens / max(1, text.forwards),
        "seconds": text.seconds,
        "model": settings["model"],
        "settings": dict(settings),
    }


class SamplesFile(JsonLinesFile):
    """A samples file: each sample is on disk as soon as it is finished, and a rerun continues the file.

    Hold [`lock_output`] meanwhile, so that no other process writes to it.

    Args:
        prompts: the prompt of each requested sample. Finished samples are kept, and missing ones get the first free
            indices, so a file can grow by samples per prompt and by prompts.
        settings: everything that determines the texts; a file with other settings is refused.
        overwrite: start again. The old file stays until the first sample is finished.
        flag: the flag that named the file, for messages.

    Raises:
        ValueError: if the file is not a samples file or has other settings.
    """

    def __init__(
        self,
        path: Path,
        prompts: Sequence[str | None],
        settings: dict[str, Any],
        *,
        overwrite: bool = False,
        flag: str = "--output",
    ) -> None:
        remedy = "name another file, or replace it with --overwrite"
        super().__init__(path, f"{flag} {path}", first_key="index", remedy=remedy, replace=overwrite)
        self.prompts, self.settings = prompts, settings
        self._requested = set(prompts)
        found: dict[int, str | None] = {}
        for number, row in () if overwrite else self.read_lines():
            self._check(number, row)
            found[row["index"]] = row.get("prompt")
        self.finished = set(found)
        #: The index of each requested sample.
        self.indices = _assign_indices(prompts, found)

    def _check(self, number: int, row: dict[str, Any]) -> None:
        if not isinstance(row.get("index"), int) or not isinstance(row.get("settings"), dict):
            raise self.foreign_line(number)
        old, new = row["settings"], dict(self.settings)
        if row.get("prompt") not in self._requested:
            old["prompt"], new["prompt"] = row.get("prompt"), self.prompts[min(row["index"], len(self.prompts) - 1)]
        differences = [
            f"{name} is {old.get(name)!r} there and {new.get(name)!r} now"
            for name in {**new, **old}
            if old.get(name) != new.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.label}: line {number} was written with other settings ({'; '.join(differences)}): repeat them "
                f"to continue, name another file, or replace it with --overwrite."
            )

    def missing(self) -> dict[int, str | None]:
        """Return the prompts of the requested samples that are not finished, keyed by index."""
        requested = zip(self.indices, self.prompts, strict=True)
        return {index: prompt for index, prompt in requested if index not in self.finished}

    def rows(self) -> list[dict[str, Any]]:
        """Return the finished samples among the requested ones, in the order of the request."""
        rows = {row["index"]: row for _, row in self.read_lines()} if self.finished else {}
        return [rows[index] for index in self.indices if index in rows]

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write missing samples, each to disk before the next is taken.

        Raises:
            ValueError: if another process changed the file.
        """
        for row in rows:
            self.write_line(row)
            self.finished.add(row["index"])


def _assign_indices(prompts: Sequence[str | None], found: Mapping[int, str | None]) -> list[int]:
    """Return the index of each prompt's sample: that of a sample in the file, or the next free one."""
    by_prompt: defaultdict[str | None, deque[int]] = defaultdict(deque)
    for index in sorted(found):
        by_prompt[found[index]].append(index)
    free = itertools.filterfalse(found.__contains__, itertools.count())
    return [by_prompt[prompt].popleft() if by_prompt[prompt] else next(free) for prompt in prompts]


def sample_seeds(seed: int, prompts: Sequence[str | None], indices: Sequence[int]) -> dict[int, int]:
    """Return the seed of each sample, keyed by index.

    Seeds count the first samples of all prompts, then all second samples, and so on. So adding samples per prompt
    gives the texts of one larger run. Adding prompts gives them only as long as each prompt has one sample.

    Args:
        seed: seed of the run.
        prompts, indices: prompt and index of each requested sample.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    counts: Counter[str | None] = Counter()
    seeds = {}
    for index, prompt in sorted(zip(indices, prompts, strict=True), key=lambda sample: sample[0]):
        seeds[index] = derived_seed(seed, counts[prompt] * len(numbers) + numbers[prompt])
        counts[prompt] += 1
    return seeds
