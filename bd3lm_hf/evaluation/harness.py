"""Models of this package for the lm-evaluation-harness: windows, seeds, and arguments of `generate`.

The models of this package in the lm-evaluation-harness: `bd3lm harness --model_args pretrained=DIR --tasks ...`.

The harness finds models in a registry of its own and loads no other package by itself. Importing this module enters
`bd3lm` there, for `lm_eval.simple_evaluate(model="bd3lm", ...)`; `bd3lm harness` is the `lm_eval` command behind such
an import, with `--model bd3lm` where no model is named.

The log-likelihood of a continuation is the bound of `token_nll` with a clean context and a noised continuation (the
exact value for an autoregressive model). It is summed over all masks where no block holds more than 8 scored tokens;
otherwise `num_samples` stratified draws estimate it, the same ones for all choices of a question.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.evaluation.perplexity import batch_of, batches_of
from bd3lm_hf.evaluation.reference_model import own_ids
from bd3lm_hf.evaluation.results import weights_digest
from bd3lm_hf.generation.text_generation import generate_batch
from bd3lm_hf.modeling.likelihood_bd3lm import MAX_EXACT_TOKENS
from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.tokenization import check_tokenizer_fits, load_tokenizer


_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class RequestWindow(NamedTuple):
    """Tokens that the model reads at once, of which the first are given."""

    ids: list[int]
    given: int

    @property
    def scored(self) -> range:
        """The places of the tokens that are not given."""
        return range(self.given, len(self.ids))

    @property
    def labelled(self) -> dict[str, list[int]]:
        """As arguments of `token_nll`: what is given has no label."""
        return {"input_ids": self.ids, "labels": [-100] * self.given + self.ids[self.given :]}


class GenerationRequest(NamedTuple):
    """The limits and stop strings of a generation request."""

    new_tokens: int
    until: tuple[str, ...]
    fields: dict[str, Any]  # of `generate`


def windows(context: Sequence[int], continuation: Sequence[int], length: int) -> list[RequestWindow]:
    """Windows of at most `length` tokens in which each token of a continuation is scored once.

    One window, whose context loses its beginning where there is no room for it. A continuation that has no room
    itself is cut: its first part has the last token of the context before it, the others what precedes them; the last
    one, which is shorter, has a context as long as possible.

    Args:
        context: not empty.
    """
    room = length - 1
    if len(continuation) <= room:
        kept = list(context[-(length - len(continuation)) :])
        return [RequestWindow([*kept, *continuation], len(kept))]
    text = [context[-1], *continuation]
    found = []
    for begin in range(1, len(text), room):
        end = min(begin + room, len(text))
        first = max(0, end - length)
        found.append(RequestWindow(text[first:end], begin - first))
    return found


def question_seed(seed: int, request: Any) -> int:
    """The seed of the question that a request belongs to: all choices of a question have the same."""
    asked = [request.task_name, request.doc_id] if request.doc_id is not None else [request.args[0]]
    return derived_seed(seed, json.dumps(asked))


def writing_of(asked: dict[str, Any], new_tokens: int) -> GenerationRequest:
    """The harness's words for what to write, in those of `generate`.

    Text is sampled with `do_sample`, or with a temperature above 0 where that is left open.

    Raises:
        ValueError: ends that are no strings, or no whole number of tokens.
    """
    fields = dict(asked)
    until = fields.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, (list, tuple)) or not all(isinstance(text, str) for text in until):
        raise ValueError(f"until={until!r}: give a string or a list of strings.")
    lengths = [fields.pop(name, None) for name in _LENGTH_NAMES]
    count = next((length for length in lengths if length is not None), new_tokens)
    temperature, sample = fields.pop("temperature", None), fields.pop("do_sample", None)
    sample = bool(temperature) if sample is None else bool(sample) and temperature != 0
    if sample and temperature is not None:
        fields["temperature"] = float(temperature)
    if not sample:
        fields = {name: value for name, value in fields.items() if name not in ("top_p", "top_k", "nucleus_p")}
    ends = tuple(text for text in until if text)
    return GenerationRequest(integer_field("max_gen_toks", count), ends, {"do_sample": sample, **fields})


def integer_field(name: str, value: Any) -> int:
    """An argument that may come as text.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or number != float(value):
        raise ValueError(f"{name}={value!r}: give a whole number of at least 1.")
    return number


class HarnessMissingError(ImportError, ValueError):
    """The lm-evaluation-harness is not installed."""


try:
    import lm_eval.models  # noqa: F401  enters the harness's own models, which it else does for an empty registry only
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise HarnessMissingError(
        f"the lm-evaluation-harness is needed: pip install 'bd3lm-hf[harness]' ({error})."
    ) from error


logger = logging.get_logger("bd3lm_hf.evaluation.harness")


_ESTIMATORS = ("auto", "exact", "stratified", "sampled")


@register_model("bd3lm")
class BD3LMHarness(TemplateLM):
    """Any model with `token_nll` and `generate`, as the harness calls it.

    All results depend on the model, the request and `seed` only, and on the size of a batch by rounding at most.

    Args:
        pretrained: folder or hub name, or a model.
        tokenizer: folder or hub name, or a tokenizer; by default that of `pretrained`.
        estimator: of the log-likelihood: `"auto"` (see the module), or one of `token_nll`'s for all requests.
        num_samples: draws of an estimate that is not exact.
        seed: of those, and of texts that are sampled.
        max_length: tokens that the model reads at once; by default, and at most, its window.
        max_gen_toks: tokens to write where a task does not say.
        add_bos_token: begin every context with the token that begins a text; an empty context always has it.
        check_greedy: find `is_greedy`, which takes one greedy text per context; without, it is reported as False.
        dtype, trust_remote_code: for loading.

    Raises:
        ValueError: an argument without meaning, or a checkpoint that cannot be loaded.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        tokenizer: Any = None,
        estimator: str = "auto",
        num_samples: int = 8,
        seed: int = 0,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        check_greedy: bool = True,
        device: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: the model has no such argument; see {type(self).__name__}.")
        self.batch_size = integer_field("batch_size", batch_size)
        self.num_samples = integer_field("num_samples", num_samples)
        self.max_gen_toks = integer_field("max_gen_toks", max_gen_toks)
        if estimator not in _ESTIMATORS:
            raise ValueError(f"estimator={estimator!r} is unknown: choose one of {', '.join(_ESTIMATORS)}.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("the adapter runs in one process: start it without accelerate launch or torchrun.")
        self.name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        if isinstance(pretrained, str):
            tokenizer = pretrained if tokenizer is None else tokenizer
            pretrained = load_model(
                pretrained, argument="pretrained", trust_remote_code=trust_remote_code, dtype=dtype
            )
        elif tokenizer is None:
            raise ValueError("a model comes without a tokenizer: give it as tokenizer=.")
        self._device = _device(device)
        self.model = pretrained.to(self._device).eval()
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if hasattr(self.model.config, "mask_token_id"):
            check_tokenizer_fits(self.tokenizer, self.model.config)
        window = self.model.config.model_length
        self.max_length = window if max_length is None else integer_field("max_length", max_length)
        if not 2 <= self.max_length <= window:
            raise ValueError(f"max_length={max_length}: the model reads from 2 to {window} tokens at once.")
        self.estimator, self.seed = estimator, seed
        self.add_bos_token, self.check_greedy = add_bos_token, check_greedy

    # --- What the harness asks of a model ----------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the token used as an empty context: BOS, or EOS if the tokenizer has no BOS."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """The tokens of a text, without any that it does not name itself."""
        return own_ids(string, self.tokenizer)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as one text, by the tokenizer's template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """Return the description of the model and its estimator for the results."""
        return {
            "model_class": type(self.model).__name__,
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_sha256": weights_digest(self.model),
            "model_dtype": str(self.model.dtype),
            "estimator": self.estimator,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "max_length": self.max_length,
            "check_greedy": self.check_greedy,
        }

    # --- Likelihoods -------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats; a lower bound unless the model is AR.

        The second value tells whether the continuation is what `generate(do_sample=False)` writes behind the context.

        Raises:
            ValueError: a model without a likelihood.
        """
        encoded = [(request.args, *self._encoded(*request.args)) for request in requests]
        seeds = [question_seed(self.seed, request) for request in requests]
        results = self._loglikelihood_tokens(encoded, seeds=seeds, disable_tqdm=disable_tqdm)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text; each token is scored once, in windows of `max_length`."""
        rows = [self._encoded("", *request.args) for request in requests]
        seeds = [question_seed(self.seed, request) for request in requests]
        results = self._sums([windows(*row, self.max_length) for row in rows], seeds, disable_tqdm)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both; there is always a context."""
        before, behind = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
        if not before and behind[:1] == [self.prefix_token_id]:
            return behind[:1], behind[1:]
        return self._begun(before), behind

    def _begun(self, context: list[int]) -> list[int]:
        prefix = [self.prefix_token_id]
        wanted = not context or (self.add_bos_token and context[:1] != prefix)
        return [*prefix, *context] if wanted else context

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        seeds: Sequence[int] | None = None,
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        seeds = [self.seed] * len(requests) if seeds is None else seeds
        rows = [windows(context, continuation, self.max_length) for _, context, continuation in requests]
        sums = self._sums(rows, seeds, disable_tqdm)
        # The first window has the context as far as there is room for it.
        pairs = [(row[0].ids[: row[0].given], list(request[2])) for row, request in zip(rows, requests, strict=True)]
        return list(zip(sums, self._are_greedy(pairs, disable_tqdm), strict=True))

    @torch.no_grad()
    def _sums(self, rows: Sequence[Sequence[RequestWindow]], seeds: Sequence[int], disable_tqdm: bool) -> list[float]:
        """The log-likelihood of each row of windows."""
        self._check_likelihood()
        flat = [(row, turn) for row, found in enumerate(rows) for turn, one in enumerate(found) if one.scored]
        texts = [rows[row][turn].labelled for row, turn in flat]
        noise = [derived_seed(seeds[row], turn) if turn else seeds[row] for row, turn in flat]
        kinds: dict[str, list[int]] = {}
        for number, (row, turn) in enumerate(flat):
            kinds.setdefault(self.estimator_of(rows[row][turn]), []).append(number)
        sums = [0.0] * len(rows)
        with tqdm(total=len(flat), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for estimator, numbers in kinds.items():
                for batch in batches_of(texts, numbers, self.batch_size):
                    inputs = batch_of(batch.rows, self._device)
                    sources = [torch.Generator(self._device).manual_seed(noise[number]) for number in batch.indices]
                    nll, mask = self.model.token_nll(
                        inputs.input_ids,
                        inputs.attention_mask,
                        estimator=estimator,
                        num_samples=self.num_samples,
                        generator=sources,
                        **inputs.context,
                    )
                    for number, total in zip(batch.indices, (nll.double() * mask).sum(1).tolist(), strict=True):
                        sums[flat[number][0]] -= total
                    bar.update(len(batch.indices))
        return sums

    def estimator_of(self, window: RequestWindow) -> str:
        """The estimator for one window, whatever else is asked for: exact where it takes few passes."""
        config = self.model.config
        if self.estimator != "auto":
            return self.estimator
        if self.model.exact_likelihood:
            return "exact"
        if config.time_conditioning:
            return "sampled"
        in_block = Counter(place // config.block_size for place in window.scored)
        return "exact" if max(in_block.values(), default=0) <= MAX_EXACT_TOKENS else "stratified"

    def _check_likelihood(self) -> None:
        if not hasattr(self.model, "token_nll") or not self.model.has_likelihood:
            raise ValueError(
                f"pretrained={self.name} is a {type(self.model).__name__}, which has no likelihood: choose tasks "
                f"whose output_type is generate_until."
            )

    def _are_greedy(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[bool]:
        """Whether each continuation is the greedy one; contexts that are the same are continued once."""
        if not self.check_greedy:
            return [False] * len(pairs)
        most: Counter[tuple[int, ...]] = Counter()
        for context, continuation in pairs:
            most[tuple(context)] = max(most[tuple(context)], len(continuation))
        groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for prompt, count in most.items():
            if count:
                groups.setdefault((len(prompt), count), []).append(prompt)
        written: dict[tuple[int, ...], list[int]] = dict.fromkeys(most, [])
        with tqdm(total=len(most), desc="greedy texts", disable=disable_tqdm) as bar:
            for (_, count), prompts in groups.items():
                for batch in _portions(prompts, self.batch_size):
                    texts = generate_batch(
                        self.model, [list(p) for p in batch], count, seeds=[self.seed] * len(batch), do_sample=False
                    )
                    written |= {prompt: text.new_ids for prompt, text in zip(batch, texts, strict=True)}
                    bar.update(len(batch))
        return [written[tuple(context)][: len(continuation)] == continuation for context, continuation in pairs]

    # --- Texts -------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated after each context, up to the first stop string or end token.

        A context keeps its last tokens, so that what is written has room in the window, or half of the window.
        """
        seen: Counter[tuple[Any, ...]] = Counter()
        groups: dict[str, list[int]] = {}
        plans, prompts, seeds = [], [], []
        for number, request in enumerate(requests):
            context, asked = request.args
            plan = writing_of(asked, self.max_gen_toks)
            room = max(self.max_length - plan.new_tokens, self.max_length // 2)
            prompt = self._begun(self.tok_encode(context))[-room:]
            # A request that is repeated gets texts of its own.
            place = (request.task_name, request.doc_id, request.idx, context)
            seeds.append(derived_seed(question_seed(self.seed, request), seen[place]))
            seen[place] += 1
            plans.append(plan)
            prompts.append(prompt)
            groups.setdefault(json.dumps([len(prompt), plan], sort_keys=True, default=str), []).append(number)
        results = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                for batch in _portions(numbers, self.batch_size):
                    self._write(batch, plans[batch[0]], prompts, seeds, results)
                    bar.update(len(batch))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result)
        return results

    def _write(
        self,
        batch: Sequence[int],
        plan: GenerationRequest,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        results: list[str],
    ) -> None:
        stops: dict[str, Any] = {"stop_strings": list(plan.until), "tokenizer": self.tokenizer} if plan.until else {}
        texts = generate_batch(
            self.model,
            [prompts[number] for number in batch],
            plan.new_tokens,
            seeds=[seeds[number] for number in batch],
            stop_at_eos=True,
            **stops,
            **plan.fields,
        )
        for number, text in zip(batch, texts, strict=True):
            written = str(self.tokenizer.decode(text.new_ids, skip_special_tokens=True))
            results[number] = written[: min((written.find(s) for s in plan.until if s in written), default=None)]


def _device(name: str | None) -> torch.device:
    """By default a GPU where there is one. The harness's command asks for the first one even where there is none."""
    if torch.cuda.is_available():
        return torch.device(name or "cuda")
    if name is not None and name.startswith("cuda"):
        logger.warning("there is no CUDA device: computing on the CPU")
    return torch.device("cpu" if name is None or name.startswith("cuda") else name)


def _portions(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))


__all__ = [
    "BD3LMHarness",
    "GenerationRequest",
    "HarnessMissingError",
    "RequestWindow",
    "integer_field",
    "question_seed",
    "windows",
    "writing_of",
]
