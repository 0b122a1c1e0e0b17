"""Generative perplexity: the per-token NLL of generated text under a reference model, in sliding windows.

As published (arXiv 2503.09573, App. C.5): a window of 1024 tokens moves by 512, and each token after the first window
is scored in the window that has it among its last 512. The first token and end tokens are never scored.
"""

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.evaluation.perplexity import SequenceScore, score_sequences, summarize
from bd3lm_hf.generation.text_generation import GeneratedText
from bd3lm_hf.modeling.likelihood_bd3lm import MAX_EXACT_TOKENS, TokenNLL
from bd3lm_hf.seeds import derived_seed
from bd3lm_hf.tokenization import encode_plain, load_tokenizer


WINDOW = 1024  # tokens that a reference model reads at once, unless its own window is shorter


class ReferenceModel:
    """Score generated text with the logits of any causal model, or with a model's own bound.

    The bound is exact for blocks of up to 8 tokens without time conditioning; otherwise 8 noise samples estimate it.

    Args:
        model: a causal language model, or a model with `token_nll`.
        window: tokens that the model reads at once; by default 1024, or fewer if the model's own window is shorter.
        unscored: token ids that are never scored; as published, the reference model's end token.
        retokenize: the tokenizers of the generating model and of the reference model, to decode with the first and
            encode with the second. By default the reference model reads the ids as they are.

    Raises:
        ValueError: if the model does not predict next tokens or has no likelihood, or its window is shorter than
            `window`.
    """

    def __init__(
        self,
        model: Any,
        *,
        window: int | None = None,
        unscored: Collection[int] = (),
        retokenize: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
    ) -> None:
        self.estimator, self.num_samples = "exact", 1
        if not hasattr(model, "token_nll"):
            if not model.can_generate():
                raise ValueError(
                    f"a {type(model).__name__} does not predict next tokens: name a causal language model."
                )
            model = CausalScore(model)
        elif not model.has_likelihood:
            raise ValueError(f"a {type(model).__name__} has no likelihood: name a causal language model.")
        elif model.config.time_conditioning:
            self.estimator, self.num_samples = "sampled", 8
        elif model.config.block_size > MAX_EXACT_TOKENS:
            self.estimator, self.num_samples = "stratified", 8
        # A model without a limit in its configuration is assumed to read a full window.
        known = getattr(model.config, "max_position_embeddings", None) or WINDOW
        self.window = min(WINDOW, known) if window is None else window
        if not 2 <= self.window <= known:
            raise ValueError(f"window={window}: the reference model reads from 2 to {known} tokens at once.")
        self.model, self.unscored, self.retokenize = model, frozenset(unscored), retokenize

    @property
    def weights(self) -> torch.nn.Module:
        return self.model.model if isinstance(self.model, CausalScore) else self.model

    def score(
        self,
        texts: Sequence[GeneratedText],
        *,
        seed: int = 0,
        batch_size: int = 8,
        indices: Sequence[int] | None = None,
    ) -> list[SequenceScore]:
        """Return the summed NLL of the new tokens of each text in nats, and how many of its tokens were scored.

        Args:
            seed: seed of an estimated bound; the noise of a text also depends on its index.
            indices: indices of the texts; 0, 1, ... by default.
        """
        indices = range(len(texts)) if indices is None else indices
        sums = {index: SequenceScore(index, 0.0, 0) for index in indices}
        windows = {index: list(self._windows(self.read(text))) for index, text in zip(indices, texts, strict=True)}
        for part in range(max(map(len, windows.values()), default=0)):
            # The n-th windows of all texts are scored together; windows of the same text have different noise.
            rows = {index: parts[part] for index, parts in windows.items() if part < len(parts)}
            scores = score_sequences(
                self.model,
                rows,  # type: ignore[arg-type]
                indices=list(rows),
                estimator=self.estimator,
                num_samples=self.num_samples,
                batch_size=batch_size,
                seed=derived_seed(seed, part) if part else seed,
            )
            for index, nll, count in scores:
                if not math.isfinite(nll):
                    raise ValueError(f"the reference model scores text {index} as {nll}: load it in float32.")
                sums[index] = SequenceScore(index, sums[index].nll + nll, sums[index].num_tokens + count)
        return list(sums.values())

    def _windows(self, text: GeneratedText) -> Iterator[dict[str, list[int]]]:
        """Yield the windows of a text that score at least one token."""
        for begin, end, first in sliding_windows(len(text.ids), self.window):
            first = max(first, text.num_given, 1)
            labels = [
                token if position >= first and token not in self.unscored else -100
                for position, token in enumerate(text.ids[begin:end], start=begin)
            ]
            if any(label != -100 for label in labels):
                yield {"input_ids": text.ids[begin:end], "labels": labels}

    def read(self, text: GeneratedText) -> GeneratedText:
        """Return the text in the reference model's tokens."""
        return text if self.retokenize is None else _retokenized(text, *self.retokenize)


def _retokenized(text: GeneratedText, writer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> GeneratedText:
    """Return a text of the tokenizer `writer` in the tokens of `own`, with its begin token.

    Special tokens that `own` has under the same name are kept, others are dropped.
    """
    foreign = {i for i in writer.all_special_ids if writer.convert_ids_to_tokens(i) not in own.all_special_tokens}
    # Prompt and new text are encoded separately, so no token spans the border between them.
    prompt, new = (
        encode_plain(str(writer.decode([token for token in ids if token not in foreign])), own)
        for ids in (text.ids[: text.num_given], text.new_ids)
    )
    read = _with_begin_token(prompt, new, own)
    return text._replace(ids=read.ids, num_given=read.num_given)


def _with_begin_token(prompt: list[int], new: list[int], tokenizer: PreTrainedTokenizerBase) -> GeneratedText:
    """Return a text whose prompt begins with BOS, or with EOS if the tokenizer has no BOS."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is not None and (prompt or new)[:1] != [begin]:
        prompt = [begin, *prompt]
    return GeneratedText([*prompt, *new], len(prompt))


def sliding_windows(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows over `length` tokens that move by half their size.

    Each is (begin, end, first): the window is [begin, end), and it scores the positions from `first` on.
    """
    # The first window scores all of its tokens, later ones only their second half.
    stride = window // 2
    yield 0, min(window, length), 0
    for begin in range(stride, length - window + stride, stride):
        yield begin, min(begin + window, length), begin + window - stride


class CausalScore(torch.nn.Module):
    """Give a causal language model of transformers an exact `token_nll`, computed from its logits."""

    has_likelihood = exact_likelihood = True

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.training = model.training

    def token_nll(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None, **unused: Any
    ) -> TokenNLL:
        """Return the NLL of each token after the first; a label of -100 is not scored.

        Raises:
            ValueError: if an id is outside the model's vocabulary.
        """
        known = self.model.get_input_embeddings().num_embeddings
        if int(input_ids.max()) >= known:
            raise ValueError(
                f"the text has the token id {int(input_ids.max())}, but the reference model has only {known} ids: let "
                f"it read the text with its own tokenizer."
            )
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        nll = torch.zeros(input_ids.shape, device=input_ids.device)
        for row, targets in enumerate(input_ids[:, 1:]):  # row by row, because float32 logits are large
            nll[row, 1:] = F.cross_entropy(logits[row, :-1].float(), targets, reduction="none")
        mask = attention_mask if labels is None else attention_mask * (labels != -100)
        return TokenNLL(nll, F.pad(mask[:, 1:], (1, 0)))


def load_reference_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    as_text: bool,
    score_end: bool,
) -> ReferenceModel:
    """Load the reference model of a folder or hub name.

    Args:
        tokenizer: tokenizer of the model that generated the text.
        as_text: always re-tokenize with the reference model's own tokenizer, as published; otherwise only if the two
            vocabularies differ.
        score_end: also score the reference model's end token.

    Raises:
        ValueError: if the checkpoint cannot be loaded, has no likelihood, or comes without a tokenizer.
    """
    model = load_model(name, argument="--judge", trust_remote_code=trust_remote_code).to(device).eval()
    own = load_tokenizer(name)
    unscored = () if score_end or own.eos_token_id is None else (own.eos_token_id,)
    retokenize = (tokenizer, own) if as_text or own.get_vocab() != tokenizer.get_vocab() else None
    try:
        return ReferenceModel(model, unscored=unscored, retokenize=retokenize)
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
    """Return the perplexity of texts or token ids under a reference model.

    The arguments are those of the metric `generative_perplexity`.

    Returns:
        `generative_perplexity` over all scored tokens and the `standard_error` of its log, `mean_perplexity` over
        texts (the figure in the paper's tables), the `perplexities` of texts (None if no token was scored), and
        `num_tokens`, the number of scored tokens.

    Raises:
        ValueError: if no token is scored, the reference model cannot be loaded or has no likelihood, or a tokenizer
            is missing.
    """
    if isinstance(judge, str):
        tokenizer = judge if tokenizer is None else tokenizer
        judge = load_model(judge, argument="judge").eval()
    judge = judge if device is None else judge.to(device)
    own = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    writer = load_tokenizer(writer) if isinstance(writer, str) else writer
    if own is None and (writer is not None or any(isinstance(text, str) for text in texts)):
        raise ValueError("texts need the judge's tokenizer: give it as tokenizer=, or give token ids.")
    end = judge.config.eos_token_id if own is None else own.eos_token_id
    ends = () if score_end or end is None else end if isinstance(end, list) else (end,)
    reference = ReferenceModel(judge, window=window, unscored=ends)
    read = []
    for text in texts:
        if isinstance(text, str):
            read.append(_with_begin_token([], encode_plain(text, own), own))  # type: ignore[arg-type]  # see above
        else:
            ids = GeneratedText(list(text), 0)
            read.append(ids if writer is None or own is None else _retokenized(ids, writer, own))
    scores = reference.score(read, seed=seed, batch_size=batch_size)
    result = summarize(scores)
    return {
        "generative_perplexity": result.perplexity,
        "mean_perplexity": mean_perplexity(scores),
        "perplexities": [_perplexity_of(score) for score in scores],
        "num_tokens": result.num_tokens,
        "standard_error": result.standard_error,
    }


def _perplexity_of(score: SequenceScore) -> float | None:
    """Return the perplexity of one text; None if no token was scored."""
    return math.exp(min(score.nll / score.num_tokens, 700)) if score.num_tokens else None


def mean_perplexity(scores: Sequence[SequenceScore]) -> float:
    """Return the mean perplexity over texts, all with the same weight: the figure in the paper's tables."""
    return statistics.fmean(value for value in map(_perplexity_of, scores) if value is not None)
