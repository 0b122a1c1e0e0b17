"""Score held-out sequences: perplexity, or the training loss of models without a likelihood.

Perplexity is exp of the mean negative log-likelihood per scored token. Any model with
`token_nll(input_ids, attention_mask, estimator=, num_samples=, generator=)` can be scored. The estimators are the
model's own and `"published"`, the protocol of the paper: one noise sample, with times t on [1e-3, 1] stratified in
order over the blocks of 16 sequences, and without a score for the first token.

Models with `has_likelihood = False` get the training loss of held-out sequences instead. It is not a bound on
log p(x), so it compares checkpoints of one model, not different models.
"""

import functools
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from bd3lm_hf.modeling.noise_bd3lm import Noise
from bd3lm_hf.seeds import derived_seed


PUBLISHED_BATCH = 16  # sequences over whose blocks the published protocol stratifies its times


class Perplexity(NamedTuple):
    """Perplexity of a model on text; for a diffusion model an upper bound (NELBO) unless its block size is 1."""

    nll: float  # mean per scored token, nats
    perplexity: float  # exp(nll)
    bits_per_token: float
    bits_per_byte: float | None  # None if the number of bytes per token is unknown
    standard_error: float  # of nll, with sequences as a random sample of text; includes the noise
    num_tokens: int  # scored tokens
    num_sequences: int
    seconds: float


class SequenceScore(NamedTuple):
    """The score of one sequence."""

    row: int  # its index in the dataset
    nll: float  # summed over its scored tokens, nats
    num_tokens: int


class TokenScores(NamedTuple):
    """The scores of the tokens of one sequence."""

    index: int  # type: ignore[assignment]  # shadows `tuple.index`
    nll: list[float]  # nats; 0 where nothing is scored
    labels: list[int]  # -100 where nothing is scored


class Protocol(NamedTuple):
    """The settings for scoring the sequences of a dataset."""

    estimator: str
    num_samples: int
    seed: int
    num_sequences: int  # in the dataset


class Batch(NamedTuple):
    """Sequences of equal length, and their indices in the dataset."""

    indices: list[int]
    rows: list[Any]


class ScoringBatch(NamedTuple):
    """Stacked sequences, padded on the right; all tensors `(batch, length)`, int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor  # 0 over padding
    context: dict[str, torch.Tensor]  # `labels`, with -100 for tokens that are given; empty if none is


# Perplexity


def perplexity(
    model: Any, sequences: Sequence[Any], *, bytes_per_token: float | None = None, **options: Any
) -> Perplexity:
    """Return the perplexity of all `sequences`.

    Args:
        bytes_per_token: mean number of UTF-8 bytes per token of this text, for `bits_per_byte`.
        options: for [`score_sequences`].

    Raises:
        ValueError: if no token is scored, or the batch size is below 1.
    """
    start = time.perf_counter()
    scores = score_sequences(model, sequences, **options)
    return summarize(scores, bytes_per_token=bytes_per_token, seconds=time.perf_counter() - start)


def score_sequences(
    model: Any,
    sequences: Sequence[Any],
    *,
    indices: Sequence[int] | None = None,
    estimator: str = "stratified",
    num_samples: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
    score: Callable[..., list[Any]] | None = None,
) -> list[Any]:
    """Return a [`SequenceScore`] for each sequence of a dataset, sorted by index.

    The result depends only on the model, the sequences, the estimator and `seed`. Each sequence has its own noise, so
    the batch size and the number of processes change nothing but rounding.

    Args:
        model: anything with `token_nll`. Its train or eval mode is restored.
        sequences: a dataset with `input_ids` (and `attention_mask`, `labels`), or sequences of token ids; rows may
            differ in length.
        indices: score only these, so several processes can share the work; all by default.
        estimator: `"published"`, or `"sampled"`, `"stratified"` or `"exact"`, see the model's `token_nll`.
        num_samples: noise samples per sequence; unused by `"exact"`, and 1 for `"published"`.
        seed: seed of the noise.
        score: returns the scores of a batch; by default `score_batch`.

    Raises:
        ValueError: if the batch size is below 1, or the model does not have the estimator.
    """
    indices = range(len(sequences)) if indices is None else indices
    protocol = Protocol(estimator, num_samples, seed, len(sequences))
    score = score or score_batch
    scores: list[Any] = []
    bar = tqdm(total=len(indices), desc="scoring", leave=False, disable=not progress)
    with bar, _evaluating(model):
        for batch in batches_of(sequences, indices, batch_size):
            scores += score(model, batch, protocol)
            bar.update(len(batch.indices))
    return sorted(scores)


def score_tokens(model: Any, sequences: Sequence[Any], **options: Any) -> list[TokenScores]:
    """Score each token of the sequences, with the arguments and noise of [`score_sequences`]."""
    return score_sequences(model, sequences, score=_score_tokens_of_batch, **options)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put a module into evaluation mode, and restore its mode at the end."""
    was_training = isinstance(model, torch.nn.Module) and model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def batches_of(sequences: Sequence[Any], indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Yield batches of equally long sequences: padding would change the noise of a sequence."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    waiting: dict[int, Batch] = {}
    for index in map(int, indices):
        row = sequences[index]
        length = len(row["input_ids"] if isinstance(row, Mapping) else row)
        batch = waiting.setdefault(length, Batch([], []))
        batch.indices.append(index)
        batch.rows.append(row)
        if len(batch.indices) == batch_size:
            yield waiting.pop(length)
    yield from waiting.values()


def score_batch(model: Any, batch: Batch, protocol: Protocol) -> list[SequenceScore]:
    """Score one batch; the noise of each sequence depends only on its index and the protocol."""
    nll, mask, _ = _token_nll(model, batch, protocol)
    # float64, so summing thousands of tokens adds no rounding error.
    sums = (nll.double() * mask).sum(1).tolist()
    return list(map(SequenceScore, batch.indices, sums, mask.long().sum(1).tolist()))


def _score_tokens_of_batch(model: Any, batch: Batch, protocol: Protocol) -> list[TokenScores]:
    nll, mask, ids = _token_nll(model, batch, protocol)
    nll, labels = nll.double().masked_fill(~mask.bool(), 0.0), ids.masked_fill(~mask.bool(), -100)
    return list(map(TokenScores, batch.indices, nll.tolist(), labels.tolist()))


@torch.no_grad()
def _token_nll(model: Any, batch: Batch, protocol: Protocol) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return NLL, mask of scored tokens, and token ids, each `(batch, length)`."""
    ids, attention_mask, context = batch_of(batch.rows, _device_of(model))
    arguments: dict[str, Any] = {"num_samples": protocol.num_samples, **context}
    if protocol.estimator == "published":
        length, count = ids.shape[1], protocol.num_sequences
        blocks = model.config.num_blocks(length)
        noise = published_noise(batch.indices, count, num_blocks=blocks, length=length, seed=protocol.seed)
        labels = context.get("labels", ids.masked_fill(attention_mask == 0, -100)).clone()
        labels[:, 0] = -100  # the first token is never scored
        arguments |= {"estimator": "sampled", "noise": noise, "labels": labels}
    else:
        # One generator per sequence, on the CPU, so a seed gives the same noise on every device.
        seeds = (derived_seed(protocol.seed, index) for index in batch.indices)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        arguments |= {"estimator": protocol.estimator, "generator": generators}
    return *model.token_nll(ids, attention_mask, **arguments), ids


def published_noise(
    indices: Sequence[int], num_sequences: int, *, num_blocks: int, length: int, seed: int = 0
) -> Noise:
    """Return the noise of the sequences at `indices` of a dataset, as the published evaluation draws it.

    The dataset is shuffled and split into batches of 16. The i-th of the N blocks of a batch gets a time from the i-th
    of N equal parts of the interval, so the k-th sequence has all its times in [k / 16, (k + 1) / 16). The random
    numbers of a sequence depend only on the seed and its index.

    Args:
        num_sequences: size of the dataset; its last batch may be smaller.
        num_blocks, length: of each sequence.
    """
    positions = _shuffled_positions(num_sequences, seed)
    blocks, tokens = [], []
    for index in indices:
        first = int(positions[index]) // PUBLISHED_BATCH * PUBLISHED_BATCH
        size = min(PUBLISHED_BATCH, num_sequences - first)
        uniform = torch.rand(num_blocks + length, generator=torch.Generator().manual_seed(derived_seed(seed, index)))
        stratum = (int(positions[index]) - first) * num_blocks + torch.arange(num_blocks)
        blocks.append((uniform[:num_blocks] + stratum) / (size * num_blocks))
        tokens.append(uniform[num_blocks:])
    block_noise = torch.stack(blocks)
    return Noise(block_noise, torch.stack(tokens), torch.zeros_like(block_noise))


@functools.lru_cache(maxsize=4)
def _shuffled_positions(count: int, seed: int) -> torch.Tensor:
    """Return the position of each sequence in the shuffled dataset, `(count,)`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).argsort()


def check_estimator(model: Any, estimator: str, num_samples: int = 1) -> None:
    """Refuse an estimator that the model does not support, by scoring a sequence of two blocks.

    Raises:
        ValueError: if it does not, with the model's own reason, such as an exact sum over too many masks.
    """
    if estimator == "published" and "noise" not in inspect.signature(model.token_nll).parameters:
        raise ValueError(
            f"estimator={estimator!r} passes `noise` to token_nll, which a {type(model).__name__} does not accept: "
            f"choose another estimator."
        )
    token = 1 if model.config.mask_token_id == 0 else 0
    length = max(2, min(2 * model.config.block_size, model.config.model_length))
    score_sequences(model, [[token] * length], estimator=estimator, num_samples=num_samples)


def summarize(
    scores: Iterable[SequenceScore], *, bytes_per_token: float | None = None, seconds: float = 0.0
) -> Perplexity:
    """Combine the scores of sequences; their order does not matter, and a row that occurs twice counts once.

    The standard error is that of a ratio estimate, sqrt(n / (n - 1) sum_i (nll_i - nll m_i)^2) / sum_i m_i for
    sequences with m_i scored tokens.

    Raises:
        ValueError: if no token was scored.
    """
    ordered = sorted({score.row: score for score in scores}.values())
    num_tokens = sum(score.num_tokens for score in ordered)
    if not num_tokens:
        raise ValueError(
            f"perplexity is undefined: {len(ordered)} sequences have no scored token. Give longer or more text."
        )
    # fsum, so the result does not depend on which process scored which sequence.
    nll = math.fsum(score.nll for score in ordered) / num_tokens
    count = len(ordered)
    spread = math.fsum((score.nll - nll * score.num_tokens) ** 2 for score in ordered)
    error = math.sqrt(count / (count - 1) * spread) / num_tokens if count > 1 else math.nan
    bits = nll / math.log(2)
    return Perplexity(
        nll=nll,
        perplexity=math.exp(nll) if nll < 700 else math.inf,  # exp overflows above 709
        bits_per_token=bits,
        bits_per_byte=None if bytes_per_token is None else bits / bytes_per_token,
        standard_error=error,
        num_tokens=num_tokens,
        num_sequences=count,
        seconds=seconds,
    )


# The unigram baseline


def unigram_perplexity(
    train_ids: Sequence[int] | torch.Tensor, eval_ids: Sequence[int] | torch.Tensor, vocab_size: int
) -> float:
    """Return the perplexity of a unigram model: training frequencies with add-one smoothing.

    Args:
        train_ids: token ids of the training text.
        eval_ids: the tokens to score, see [`scored_token_ids`].
        vocab_size: number of ids, each of which gets one extra count.

    Raises:
        ValueError: if there is nothing to score.
    """
    both = (torch.as_tensor(ids, dtype=torch.long) for ids in (train_ids, eval_ids))
    train, evaluated = (torch.bincount(ids, minlength=vocab_size).double() for ids in both)
    if not evaluated.sum():
        raise ValueError("eval_ids is empty: give at least one token to score.")
    log_probability = (train + 1).log() - (train.sum() + vocab_size).log()
    nll = -(evaluated * log_probability).sum() / evaluated.sum()
    return math.exp(nll.item())


@torch.no_grad()
def scored_token_ids(model: Any, sequences: Sequence[Any], *, batch_size: int = 8) -> torch.Tensor:
    """Return the token ids `(num_tokens,)` of `sequences` that `model` scores, on the CPU.

    A baseline must score the same tokens as the model it is compared with: no padding, no given first token. This
    takes one forward pass with one noise sample per sequence.
    """
    found = []
    for start in range(0, len(sequences), batch_size):
        rows = [sequences[index] for index in range(start, min(start + batch_size, len(sequences)))]
        input_ids, attention_mask, context = batch_of(rows, _device_of(model))
        mask = model.token_nll(input_ids, attention_mask, estimator="sampled", num_samples=1, **context).mask
        found.append(input_ids[mask.bool()].cpu())
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def batch_of(rows: Sequence[Any], device: torch.device | str = "cpu") -> ScoringBatch:
    """Stack sequences of any length.

    Args:
        rows: mappings with `input_ids` and optional `attention_mask` and `labels`, or plain sequences of ids.
    """

    def stack(column: list[torch.Tensor], padding: int) -> torch.Tensor:
        return pad_sequence(column, batch_first=True, padding_value=padding).to(device)

    def column(name: str, default: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(mappings, ids, strict=True)
        return [torch.as_tensor(row.get(name, default(own)), dtype=torch.long) for row, own in pairs]

    mappings: list[Mapping[str, Any]] = [row if isinstance(row, Mapping) else {"input_ids": row} for row in rows]
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in mappings]
    masks, labels = column("attention_mask", torch.ones_like), column("labels", lambda own: own)
    has_context = any(bool(((y == -100) & (mask == 1)).any()) for y, mask in zip(labels, masks, strict=True))
    return ScoringBatch(stack(ids, 0), stack(masks, 0), {"labels": stack(labels, -100)} if has_context else {})


def _device_of(model: Any) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


# The held-out loss of a model without a likelihood


class HeldOutLoss(NamedTuple):
    """The training loss on held-out text."""

    loss: float  # mean per labelled token, nats
    standard_error: float  # of loss, with sequences as a random sample of text; includes the noise
    num_tokens: int  # labelled tokens
    num_sequences: int
    seconds: float


def sequence_losses(
    model: Any, sequences: Sequence[Any], *, batch_size: int = 8, **options: Any
) -> list[SequenceScore]:
    """Return the losses of sequences, with the arguments and noise of [`score_sequences`] except its estimator.

    Args:
        model: its `forward` returns a mean loss per labelled token, and takes the noise of each row.
        batch_size: noise samples of a sequence per forward pass.

    Raises:
        ValueError: if the batch size is below 1, or the model cannot learn from a sequence.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    score = functools.partial(_score_loss, samples_at_once=batch_size)
    return score_sequences(model, sequences, batch_size=1, score=score, **options)


@torch.no_grad()
def _score_loss(model: Any, batch: Batch, protocol: Protocol, *, samples_at_once: int) -> list[SequenceScore]:
    """Score a single sequence by the mean loss over its noise samples."""
    (index,), device = batch.indices, _device_of(model)
    input_ids, attention_mask, context = batch_of(batch.rows, device)
    labels = context.get("labels", input_ids).masked_fill(attention_mask == 0, -100)
    count = int((labels != -100).sum())
    length, blocks = input_ids.shape[1], model.config.num_blocks(input_ids.shape[1])
    generator = torch.Generator().manual_seed(derived_seed(protocol.seed, index))
    noise = torch.rand((protocol.num_samples, 2 * blocks + length), generator=generator)
    total = 0.0
    for part in noise.split(samples_at_once):
        fields = part.to(device).split([blocks, length, blocks], dim=1)
        rows = len(part)
        loss = model(
            input_ids=input_ids.expand(rows, -1),
            attention_mask=attention_mask.expand(rows, -1),
            labels=labels.expand(rows, -1),
            **Noise(*fields)._asdict(),
        ).loss
        total += float(loss) * rows
    return [SequenceScore(index, total / protocol.num_samples * count, count)]


def summarize_losses(scores: Iterable[SequenceScore], *, seconds: float = 0.0) -> HeldOutLoss:
    """Combine the losses of sequences; their order does not matter, and a row that occurs twice counts once.

    Raises:
        ValueError: if no sequence has a labelled token.
    """
    mean = summarize(scores, seconds=seconds)
    return HeldOutLoss(mean.nll, mean.standard_error, mean.num_tokens, mean.num_sequences, seconds)
