"""Judges of generated text: the nll of its tokens under another language model, in windows that slide over it.

As published (arXiv 2503.09573, App. C.5): a window of 1024 tokens moves by 512, and a token behind the first window is
scored by the one window that has it in its last 512. The first token is never scored, and an end token nowhere.
"""

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.evaluation.perplexity import SequenceScore, score_sequences, summarize
from bd3lm_hf.generation.text_generation import GeneratedText
from bd3lm_hf.modeling.likelihood_bd3lm import MAX_EXACT_TOKENS
from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.tokenization import load_tokenizer


#: Tokens that a judge reads at once, if its own window has room for them; the window moves by half of them.
WINDOW = 1024


class ReferenceModel:
    """Scores texts with a model that has `token_nll`.

    Args:
        estimator: of the model's bound, see its `token_nll`; an autoregressive model is exact with any.
        window: tokens that the model reads at once; by default 1024, or fewer if it knows no more positions.
        unscored: token ids that count nowhere, as published the judge's end token.
        retokenize: texts are decoded by the writer's tokenizer and encoded by the judge's own: (writer's, judge's).

    Raises:
        ValueError: a model without a likelihood, or a window that it does not have.
    """

    def __init__(
        self,
        model: Any,
        *,
        estimator: str = "exact",
        num_samples: int = 1,
        window: int | None = None,
        unscored: Collection[int] = (),
        retokenize: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
    ) -> None:
        if not model.has_likelihood:
            raise ValueError(f"a {type(model).__name__} has no likelihood to judge by: name a causal language model.")
        known = model.context_length if isinstance(model, CausalScore) else model.config.max_position_embeddings
        self.window = min(WINDOW, known) if window is None else window
        if not 2 <= self.window <= known:
            raise ValueError(f"window={self.window}: the judge reads from 2 to {known} tokens at once.")
        self.model, self.estimator, self.num_samples = model, estimator, num_samples
        self.unscored, self.retokenize = frozenset(unscored), retokenize

    @property
    def weights(self) -> torch.nn.Module:
        """The module that holds the weights."""
        return self.model.model if isinstance(self.model, CausalScore) else self.model

    def score(
        self,
        texts: Sequence[GeneratedText],
        *,
        seed: int = 0,
        batch_size: int = 8,
        numbers: Sequence[int] | None = None,
    ) -> list[SequenceScore]:
        """The nll of what was written of each text, in nats, and how many of its tokens were scored.

        Args:
            seed: of a bound that is estimated; a text's noise is that of its number.
            numbers: of the texts; by default their places.
        """
        numbers = range(len(texts)) if numbers is None else numbers
        read = [self.read(text) for text in texts]
        sums = {number: SequenceScore(number, 0.0, 0) for number in numbers}
        windows = {number: list(self._windows(text)) for number, text in zip(numbers, read, strict=True)}
        for turn in range(max(map(len, windows.values()), default=0)):
            # The windows of one turn are scored together; those of a text have noise of their own.
            rows = {number: rows[turn] for number, rows in windows.items() if turn < len(rows)}
            scores = score_sequences(
                self.model,
                rows,  # type: ignore[arg-type]
                indices=list(rows),
                estimator=self.estimator,
                num_samples=self.num_samples,
                batch_size=batch_size,
                seed=derived_seed(seed, turn) if turn else seed,
            )
            for number, nll, count in scores:
                sums[number] = SequenceScore(number, sums[number].nll + nll, sums[number].num_tokens + count)
        return list(sums.values())

    def _windows(self, text: GeneratedText) -> Iterator[dict[str, list[int]]]:
        """The windows of a text that have something to score."""
        for begin, end, first in sliding_windows(len(text.ids), self.window):
            first = max(first, text.num_given, 1)
            labels = [
                token if place >= first and token not in self.unscored else -100
                for place, token in enumerate(text.ids[begin:end], start=begin)
            ]
            if any(label != -100 for label in labels):
                yield {"input_ids": text.ids[begin:end], "labels": labels}

    def read(self, text: GeneratedText) -> GeneratedText:
        """The text in the judge's tokens, its beginning marked as the judge does.

        Special tokens that the judge has by the same name stay, others are left out.
        """
        if self.retokenize is None:
            return text
        writer, own = self.retokenize
        foreign = {i for i in writer.all_special_ids if writer.convert_ids_to_tokens(i) not in own.all_special_tokens}
        given, written = (
            own_ids(str(writer.decode([token for token in ids if token not in foreign])), own)
            for ids in (text.ids[: text.num_given], text.new_ids)
        )
        read = begun(given, written, own)
        return text._replace(ids=read.ids, num_given=read.num_given)


def own_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text of any length, without any that it does not name itself."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def begun(given: list[int], written: list[int], tokenizer: PreTrainedTokenizerBase) -> GeneratedText:
    """A text that begins with the token that begins (or else ends) a text, which is then given."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is not None and (given or written)[:1] != [begin]:
        given = [begin, *given]
    return GeneratedText([*given, *written], len(given))


def sliding_windows(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Windows over `length` tokens that move by half their size: begin, end, and the first place that each scores."""
    stride = window // 2
    yield 0, min(window, length), 0
    for begin in range(stride, length - window + stride, stride):
        yield begin, min(begin + window, length), begin + window - stride


class CausalScore(torch.nn.Module):
    """`token_nll` of any causal language model of transformers, from its logits: exact."""

    has_likelihood = exact_likelihood = True

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.training = model.training

    @property
    def context_length(self) -> int:
        """The tokens that the model can read at once, where its configuration limits them."""
        return getattr(self.config, "max_position_embeddings", None) or WINDOW

    def token_nll(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None, **unused: Any
    ) -> Any:
        """The nll `(batch, length)` of each token behind the first, nats, and which were scored: no label of -100.

        Raises:
            ValueError: ids outside the model's vocabulary.
        """
        known = self.model.get_input_embeddings().num_embeddings
        if int(input_ids.max()) >= known:
            raise ValueError(
                f"the text holds the id {int(input_ids.max())}, but the judge knows {known} ids: let it read the text "
                f"with its own tokenizer."
            )
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        nll = torch.zeros(input_ids.shape, device=input_ids.device)
        for row, targets in enumerate(input_ids[:, 1:]):  # one by one: the logits in float32 are large
            nll[row, 1:] = F.cross_entropy(logits[row, :-1].float(), targets, reduction="none")
        scored = attention_mask if labels is None else attention_mask * (labels != -100)
        return _Scored(nll, F.pad(scored[:, 1:], (1, 0)))


class _Scored(NamedTuple):
    nll: torch.Tensor
    mask: torch.Tensor


def reference_model_of(model: Any, **options: Any) -> ReferenceModel:
    """A judge by any causal model, or by a model's own bound: exact up to blocks of 8, else with 8 draws.

    Args:
        options: of [`Judge`].

    Raises:
        ValueError: a model that predicts no next tokens, or has no likelihood.
    """
    if not hasattr(model, "token_nll"):
        if not model.can_generate():
            raise ValueError(f"a {type(model).__name__} predicts no next tokens: name a causal language model.")
        return ReferenceModel(CausalScore(model), **options)
    if not model.has_likelihood:
        raise ValueError(f"a {type(model).__name__} has no likelihood to judge by: name a causal language model.")
    if model.config.time_conditioning:
        return ReferenceModel(model, estimator="sampled", num_samples=8, **options)
    if model.config.block_size > MAX_EXACT_TOKENS:
        return ReferenceModel(model, estimator="stratified", num_samples=8, **options)
    return ReferenceModel(model, estimator="exact", **options)


def load_reference_model(
    name: str,
    writer: PreTrainedTokenizerBase,
    *,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    as_text: bool,
    score_end: bool,
) -> ReferenceModel:
    """The judge of a folder or hub name.

    Args:
        writer: tokenizer of the model that wrote the texts.
        as_text: the judge reads texts with its own tokenizer, as published; otherwise it takes the writer's ids where
            both have the same vocabulary.
        score_end: score the judge's end token, too.

    Raises:
        ValueError: a checkpoint that cannot be loaded or cannot judge, or comes without a tokenizer.
    """
    model = load_model(name, argument="--judge", trust_remote_code=trust_remote_code).to(device).eval()
    own = load_tokenizer(name)
    unscored = () if score_end or own.eos_token_id is None else (own.eos_token_id,)
    foreign = own.get_vocab() != writer.get_vocab()
    try:
        return reference_model_of(model, unscored=unscored, retokenize=(writer, own) if as_text or foreign else None)
    except ValueError as error:
        raise ValueError(f"--judge {name}: {error}") from error


def score_texts(
    texts: Sequence[str | Sequence[int]],
    judge: Any,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    *,
    writer: PreTrainedTokenizerBase | str | None = None,
    window: int | None = None,
    score_end: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Return the perplexity of texts or token ids under a reference model; see the metric for the arguments.

    Returns:
        `generative_perplexity` over all scored tokens, `mean_perplexity` of the perplexities of texts (the figure in
        the paper's tables), the `perplexities` themselves (None where a text has no scored token), `num_tokens` scored
        and the `standard_error` of the log of the first.

    Raises:
        ValueError: no scored token, a judge that cannot be loaded or cannot judge, or a missing tokenizer.
    """
    if isinstance(judge, str):
        tokenizer = judge if tokenizer is None else tokenizer
        judge = load_model(judge, argument="judge").eval()
    judge = judge if device is None else judge.to(device)
    own = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    writer = load_tokenizer(writer) if isinstance(writer, str) else writer
    if own is None and (writer is not None or any(isinstance(text, str) for text in texts)):
        raise ValueError("texts are read by the judge's tokenizer: give it as tokenizer=, or give token ids.")
    end = judge.config.eos_token_id if own is None else own.eos_token_id
    ends = () if score_end or end is None else end if isinstance(end, list) else (end,)
    retokenize = None if writer is None or own is None else (writer, own)
    scorer = reference_model_of(judge, window=window, unscored=ends, retokenize=retokenize)
    read = [begun([], own_ids(x, own), own) if isinstance(x, str) else GeneratedText(list(x), 0) for x in texts]  # type: ignore
    scores = scorer.score(read, seed=seed, batch_size=batch_size)
    result = summarize(scores)
    return {
        "generative_perplexity": result.perplexity,
        "mean_perplexity": mean_perplexity(scores),
        "perplexities": [perplexity_of(score) for score in scores],
        "num_tokens": result.num_tokens,
        "standard_error": result.standard_error,
    }


def perplexity_of(score: SequenceScore) -> float | None:
    """The perplexity of one text; None where it has no scored token."""
    return math.exp(min(score.nll / score.num_tokens, 700)) if score.num_tokens else None


def mean_perplexity(scores: Sequence[SequenceScore]) -> float:
    """The mean over texts of their perplexities: the figure in the paper's tables, where long texts count no more."""
    return statistics.fmean(value for value in map(perplexity_of, scores) if value is not None)


__all__ = [
    "CausalScore",
    "ReferenceModel",
    "WINDOW",
    "begun",
    "load_reference_model",
    "mean_perplexity",
    "own_ids",
    "perplexity_of",
    "reference_model_of",
    "score_texts",
    "sliding_windows",
]
