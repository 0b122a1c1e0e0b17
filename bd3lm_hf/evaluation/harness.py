"""BD3-LM models in the lm-evaluation-harness: `bd3lm harness --model_args pretrained=DIR --tasks ...`.

The harness looks models up in its own registry and imports no other packages. Importing this module registers `bd3lm`
there, for `lm_eval.simple_evaluate(model="bd3lm", ...)`. `bd3lm harness` runs the `lm_eval` command after that import,
with `--model bd3lm` if no model is named.

The log-likelihood of a continuation is the bound of `token_nll` with a clean context and a noised continuation (the
exact value for an autoregressive model). It is summed over all masks if no block has more than 8 scored tokens.
Otherwise `num_samples` stratified noise samples estimate it, the same ones for all choices of a question.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from bd3lm_hf.checkpoints import find_device, load_model, window_of
from bd3lm_hf.evaluation.perplexity import batch_of, batches_of
from bd3lm_hf.evaluation.results import weights_digest
from bd3lm_hf.generation.text_generation import generate_batch
from bd3lm_hf.modeling.likelihood_bd3lm import MAX_EXACT_TOKENS
from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.tokenization import check_tokenizer_fits, encode_plain, load_tokenizer


class HarnessMissingError(ImportError, ValueError):
    """The lm-evaluation-harness is not installed."""


try:
    # Registers the harness's own models, which the harness itself does only while its registry is empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import chunks
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise HarnessMissingError(
        f"the lm-evaluation-harness is needed: pip install 'bd3lm-hf[harness]' ({error})."
    ) from error


logger = logging.get_logger("bd3lm_hf.evaluation.harness")

_ESTIMATORS = ("auto", "exact", "stratified", "sampled")
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class RequestWindow(NamedTuple):
    """Tokens that the model reads at once, beginning with the context."""

    ids: list[int]
    num_context: int

    @property
    def scored(self) -> range:
        """The positions of the tokens that are scored."""
        return range(self.num_context, len(self.ids))

    @property
    def example(self) -> dict[str, list[int]]:
        """The window as arguments of `token_nll`: context has no label."""
        return {"input_ids": self.ids, "labels": [-100] * self.num_context + self.ids[self.num_context :]}


class GenerationRequest(NamedTuple):
    """The limits and stop strings of a generation request."""

    new_tokens: int
    until: tuple[str, ...]
    fields: dict[str, Any]  # of `generate`


def request_windows(context: Sequence[int], continuation: Sequence[int], length: int) -> list[RequestWindow]:
    """Return windows of at most `length` tokens that score each token of a continuation once.

    A continuation that fits is one window, with the context truncated on the left. A longer one is split as in the
    harness: each window has the one token before it as context, except that the last window, which is shorter, has as
    much context as fits.

    Args:
        context: at least one token.
    """
    room = length - 1
    if len(continuation) <= room:
        pairs = [(list(context[-(length - len(continuation)) :]), list(continuation))]
    else:
        rolling = get_rolling_token_windows(list(continuation), context[-1], max_seq_len=room, context_len=1)
        pairs = list(map(make_disjoint_window, rolling))
    return [RequestWindow([*before, *scored], len(before)) for before, scored in pairs]


def question_seed(seed: int, request: Any) -> int:
    """Return the seed of the question that a request belongs to; all choices of a question share it."""
    question = [request.task_name, request.doc_id] if request.doc_id is not None else [request.args[0]]
    return derived_seed(seed, json.dumps(question))


def generation_request(options: dict[str, Any], new_tokens: int) -> GenerationRequest:
    """Translate the options of a task into those of `generate`.

    Text is sampled with `do_sample`, or with a temperature above 0 if `do_sample` is not set.

    Args:
        new_tokens: limit for tasks that do not set one.

    Raises:
        ValueError: if a stop string is not a string, or the limit is not an integer of at least 1.
    """
    fields = dict(options)
    until = fields.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, (list, tuple)) or not all(isinstance(text, str) for text in until):
        raise ValueError(f"until={until!r}: give a string or a list of strings.")
    lengths = [fields.pop(name, None) for name in _LENGTH_NAMES]
    count = next((length for length in lengths if length is not None), new_tokens)
    temperature, do_sample = fields.pop("temperature", None), fields.pop("do_sample", None)
    do_sample = bool(temperature) if do_sample is None else bool(do_sample) and temperature != 0
    if do_sample and temperature is not None:
        fields["temperature"] = float(temperature)
    if not do_sample:
        fields = {name: value for name, value in fields.items() if name not in ("top_p", "top_k", "nucleus_p")}
    stops = tuple(text for text in until if text)
    return GenerationRequest(integer_field("max_gen_toks", count), stops, {"do_sample": do_sample, **fields})


def integer_field(name: str, value: Any) -> int:
    """Convert an argument, possibly a string, to an integer.

    Raises:
        ValueError: if it is not an integer of at least 1.
    """
    try:
        number = int(value) if int(value) == float(value) else 0
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r}: give an integer >= 1.")
    return number


@register_model("bd3lm")
class BD3LMHarness(TemplateLM):
    """Adapt any model with `token_nll` and `generate` to the harness.

    Results depend on the model, the request and `seed`, and apart from rounding not on the batch size.

    Args:
        pretrained: folder or hub name, or a model.
        tokenizer: folder or hub name, or a tokenizer; by default that of `pretrained`.
        estimator: estimator of the log-likelihood: `"auto"` (see the module), or one of `token_nll` for all requests.
        num_samples: noise samples of an estimate that is not exact.
        seed: seed of the noise samples and of sampled text.
        max_batch_size: unused; the harness's command passes it.
        max_length: tokens that the model reads at once; by default, and at most, its window.
        max_gen_toks: tokens to generate if a task sets no limit.
        add_bos_token: begin every context with BOS; an empty context always has it.
        check_greedy: compute `is_greedy`, which takes one greedy text per context; otherwise it is reported as False.
        dtype, trust_remote_code: for loading.

    Raises:
        ValueError: if an argument is wrong, or the checkpoint cannot be loaded.
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
            raise ValueError(f"{', '.join(unknown)}: there is no such argument; see {type(self).__name__}.")
        self.batch_size = integer_field("batch_size", batch_size)
        self.num_samples = integer_field("num_samples", num_samples)
        self.max_gen_toks = integer_field("max_gen_toks", max_gen_toks)
        if estimator not in _ESTIMATORS:
            raise ValueError(f"estimator={estimator!r} is unknown: choose one of {', '.join(_ESTIMATORS)}.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("the adapter runs in one process: start it without accelerate launch or torchrun.")
        self.name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        if isinstance(pretrained, str):
            pretrained = os.path.expanduser(pretrained)  # the shell does not expand it inside --model_args
            tokenizer = pretrained if tokenizer is None else tokenizer
            options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": dtype}
            pretrained = load_model(pretrained, argument="pretrained", **options)
        elif tokenizer is None:
            raise ValueError("a model that is passed as an object needs a tokenizer: give it as tokenizer=.")
        self._device = _device(device)
        self.model = pretrained.to(self._device).eval()
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if hasattr(self.model.config, "mask_token_id"):
            check_tokenizer_fits(self.tokenizer, self.model.config)
        window = window_of(self.model)
        self.max_length = window if max_length is None else integer_field("max_length", max_length)
        if not 2 <= self.max_length <= window:
            raise ValueError(f"max_length={max_length}: the model reads from 2 to {window} tokens at once.")
        self.estimator, self.seed = estimator, seed
        self.add_bos_token, self.check_greedy = add_bos_token, check_greedy

    # The interface that the harness expects

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token used as an empty context: BOS, or EOS if the tokenizer has no BOS."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Tokenize a text without adding special tokens."""
        return encode_plain(string, self.tokenizer)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages as text with the tokenizer's chat template."""
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
        settings = ("estimator", "num_samples", "seed", "max_length", "check_greedy")
        return {
            "model_class": type(self.model).__name__,
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_sha256": weights_digest(self.model),
            "model_dtype": str(self.model.dtype),
            **{name: getattr(self, name) for name in settings},
        }

    # Likelihoods

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats; a lower bound unless the model is autoregressive.

        The second value is whether the continuation is what `generate(do_sample=False)` generates after the context.

        Raises:
            ValueError: if the model has no likelihood.
        """
        encoded = [(request.args, *self._encode(*request.args)) for request in requests]
        seeds = [question_seed(self.seed, request) for request in requests]
        results = self._loglikelihood_tokens(encoded, seeds=seeds, disable_tqdm=disable_tqdm)
        return self._cached("loglikelihood", requests, results)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text; each token is scored once, in windows of `max_length`."""
        windows = [request_windows(*self._encode("", *request.args), self.max_length) for request in requests]
        seeds = [question_seed(self.seed, request) for request in requests]
        return self._cached("loglikelihood_rolling", requests, self._sums(windows, seeds, disable_tqdm))

    def _cached(self, kind: str, requests: list[Any], results: list[Any]) -> list[Any]:
        """Add the results to the harness's cache, and return them."""
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)
        return results

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of context and continuation; the context is never empty."""
        before, after = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
        if not before and after[:1] == [self.prefix_token_id]:
            return after[:1], after[1:]
        return self._with_prefix(before), after

    def _with_prefix(self, context: list[int]) -> list[int]:
        prefix = [self.prefix_token_id]
        is_needed = not context or (self.add_bos_token and context[:1] != prefix)
        return [*prefix, *context] if is_needed else context

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        seeds: Sequence[int] | None = None,
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        seeds = [self.seed] * len(requests) if seeds is None else seeds
        windows = [request_windows(context, continuation, self.max_length) for _, context, continuation in requests]
        sums = self._sums(windows, seeds, disable_tqdm)
        # The first window has as much of the context as fits.
        contexts = [first.ids[: first.num_context] for first, *_ in windows]
        continuations = [continuation for _, _, continuation in requests]
        return list(zip(sums, self._are_greedy(contexts, continuations, disable_tqdm), strict=True))

    @torch.no_grad()
    def _sums(
        self, requests: Sequence[Sequence[RequestWindow]], seeds: Sequence[int], disable_tqdm: bool
    ) -> list[float]:
        """Return the log-likelihood of each request, summed over its windows."""
        if not hasattr(self.model, "token_nll") or not self.model.has_likelihood:
            raise ValueError(
                f"pretrained={self.name} is a {type(self.model).__name__}, which has no likelihood: choose tasks "
                f"whose output_type is generate_until."
            )
        # Each window, the index of its request and the seed of its noise.
        windows = [
            (window, index, derived_seed(seeds[index], part) if part else seeds[index])
            for index, parts in enumerate(requests)
            for part, window in enumerate(parts)
            if window.scored
        ]
        by_estimator: dict[str, list[int]] = {}
        for number, (window, *_) in enumerate(windows):
            by_estimator.setdefault(self.estimator_of(window), []).append(number)
        examples = [window.example for window, *_ in windows]
        sums = [0.0] * len(requests)
        with tqdm(total=len(windows), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for estimator, numbers in by_estimator.items():
                for batch in batches_of(examples, numbers, self.batch_size):
                    inputs = batch_of(batch.rows, self._device)
                    nll, mask = self.model.token_nll(
                        inputs.input_ids,
                        inputs.attention_mask,
                        estimator=estimator,
                        num_samples=self.num_samples,
                        generator=[torch.Generator().manual_seed(windows[number][2]) for number in batch.indices],
                        **inputs.context,
                    )
                    for number, total in zip(batch.indices, (nll.double() * mask).sum(1).tolist(), strict=True):
                        sums[windows[number][1]] -= total
                    bar.update(len(batch.indices))
        return sums

    def estimator_of(self, window: RequestWindow) -> str:
        """Return the estimator for one window, regardless of the others: exact if that takes few forward passes."""
        config = self.model.config
        if self.estimator != "auto":
            return self.estimator
        if self.model.exact_likelihood:
            return "exact"
        if config.time_conditioning:
            return "sampled"
        # An exact sum takes 2^k - 1 forward passes for k scored tokens in a block.
        in_block = Counter(position // config.block_size for position in window.scored)
        return "exact" if max(in_block.values(), default=0) <= MAX_EXACT_TOKENS else "stratified"

    def _are_greedy(
        self, contexts: Sequence[list[int]], continuations: Sequence[list[int]], disable_tqdm: bool
    ) -> list[bool]:
        """Return whether each continuation is the greedy one; equal contexts are continued once."""
        if not self.check_greedy:
            return [False] * len(contexts)
        longest: Counter[tuple[int, ...]] = Counter()
        for context, continuation in zip(map(tuple, contexts), continuations, strict=True):
            longest[context] = max(longest[context], len(continuation))
        # Only prompts of the same length and limit share a batch, so none is padded or continued further than needed.
        groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for prompt, count in longest.items():
            if count:
                groups.setdefault((len(prompt), count), []).append(prompt)
        greedy: dict[tuple[int, ...], list[int]] = dict.fromkeys(longest, [])
        with tqdm(total=len(longest), desc="greedy texts", disable=disable_tqdm) as bar:
            for (_, count), prompts in groups.items():
                for batch in chunks(prompts, self.batch_size):
                    texts = generate_batch(self.model, batch, count, seeds=[self.seed] * len(batch), do_sample=False)
                    greedy |= {prompt: text.new_ids for prompt, text in zip(batch, texts, strict=True)}
                    bar.update(len(batch))
        pairs = zip(contexts, continuations, strict=True)
        return [greedy[tuple(context)][: len(continuation)] == continuation for context, continuation in pairs]

    # Generated text

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated after each context, up to the first stop string or end token.

        A context is truncated on the left to leave room for the new tokens, but to no less than half of the window.
        """
        repeats: Counter[tuple[Any, ...]] = Counter()
        groups: dict[str, list[int]] = {}
        plans, prompts, seeds = [], [], []
        for number, request in enumerate(requests):
            context, options = request.args
            plan = generation_request(options, self.max_gen_toks)
            room = max(self.max_length - plan.new_tokens, self.max_length // 2)
            prompt = self._with_prefix(self.tok_encode(context))[-room:]
            # Each repetition of a request gets its own seed.
            key = (request.task_name, request.doc_id, request.idx, context)
            seeds.append(derived_seed(question_seed(self.seed, request), repeats[key]))
            repeats[key] += 1
            plans.append(plan)
            prompts.append(prompt)
            groups.setdefault(json.dumps([len(prompt), plan], sort_keys=True, default=str), []).append(number)
        results = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                for batch in chunks(numbers, self.batch_size):
                    inputs = [prompts[number] for number in batch], [seeds[number] for number in batch]
                    for number, text in zip(batch, self._generate(plans[batch[0]], *inputs), strict=True):
                        results[number] = text
                    bar.update(len(batch))
        return self._cached("generate_until", requests, results)

    def _generate(self, plan: GenerationRequest, prompts: list[list[int]], seeds: list[int]) -> list[str]:
        stops: dict[str, Any] = {"stop_strings": list(plan.until), "tokenizer": self.tokenizer} if plan.until else {}
        texts = generate_batch(
            self.model, prompts, plan.new_tokens, seeds=seeds, stop_at_eos=True, **stops, **plan.fields
        )
        decoded = [str(self.tokenizer.decode(text.new_ids, skip_special_tokens=True)) for text in texts]
        return [text[: min((text.find(s) for s in plan.until if s in text), default=None)] for text in decoded]


def _device(name: str | None) -> torch.device:
    """Return the named device, by default a GPU if there is one; the harness's command asks for CUDA regardless."""
    if name is not None and name.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("there is no CUDA device: computing on the CPU")
        name = None
    return find_device(name)
