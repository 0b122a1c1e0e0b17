"""Perplexity of a language model on held-out sequences: exp of the mean negative log-likelihood per scored token.

Any model with the verb `token_nll(input_ids, attention_mask, estimator=, num_samples=, generator=)` can be scored.
The estimators are the model's own and `"published"`, the protocol of the paper, which spans sequences: one draw, whose
times t on [1e-3, 1] are dealt to the blocks of 16 sequences in order, and a first token that is never scored.

The training loss of held-out sequences: how models are followed that have no likelihood, and hence no perplexity.

Such a model says `has_likelihood = False`. Its loss compares checkpoints of one model; it is no bound on log p(x), and
compares with no other model.
"""

import functools
import inspect
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from bd3lm_hf.modeling.noise_bd3lm import Noise
from bd3lm_hf.seeds import derived_seed


#: Sequences over whose blocks the published protocol spreads its times.
PUBLISHED_BATCH = 16


class Perplexity(NamedTuple):
    """Perplexity of a model on text; for a diffusion model an upper bound (NELBO) unless its block size is 1."""

    nll: float  # mean per scored token, nats
    perplexity: float  # exp(nll)
    bits_per_token: float
    bits_per_byte: float | None  # None where the bytes of a token are unknown
    standard_error: float  # of nll: sequences as a random sample of text, noise draws included
    num_tokens: int  # scored tokens
    num_sequences: int
    seconds: float


class SequenceScore(NamedTuple):
    """The score of one sequence."""

    row: int  # its place in the dataset
    nll: float  # summed over its scored tokens, nats
    num_tokens: int


def perplexity(
    model: Any,
    sequences: Sequence[Any],
    *,
    estimator: str = "stratified",
    num_samples: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    bytes_per_token: float | None = None,
    progress: bool = False,
) -> Perplexity:
    """Score all `sequences`.

    The result depends on the model, the sequences, the estimator and `seed` only: every sequence has its own source of
    noise, so batch size and the number of processes change rounding at most.

    Args:
        model: anything with `token_nll`.
        sequences: a dataset with `input_ids` (and `attention_mask`, `labels`), or sequences of token ids; rows may
            differ in length.
        estimator: `"published"`, or `"sampled"`, `"stratified"` or `"exact"`, see the model's `token_nll`.
        num_samples: noise draws per sequence; unused by `"exact"`, and 1 for `"published"`.
        seed: fixes the noise.
        device: where to compute; the model's device by default.
        bytes_per_token: mean UTF-8 bytes of a token of this text, for `bits_per_byte`.

    Raises:
        ValueError: no sequences, none with a scored token, or a batch size below 1.
    """
    start = time.perf_counter()
    scores = score_sequences(
        model,
        sequences,
        estimator=estimator,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        device=device,
        progress=progress,
    )
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
    device: torch.device | str | None = None,
    progress: bool = False,
) -> list[SequenceScore]:
    """Score the sequences at `indices` (all by default), so that several processes can share the work.

    See [`perplexity`] for the arguments. The model's train or eval mode is restored.
    """
    options: dict[str, Any] = {
        "indices": indices,
        "estimator": estimator,
        "num_samples": num_samples,
        "batch_size": batch_size,
    }
    return _score(model, sequences, score_batch, seed=seed, device=device, progress=progress, **options)


class TokenScores(NamedTuple):
    """The tokens of one sequence."""

    index: int  # type: ignore[assignment]  # in place of `tuple.index`
    nll: list[float]  # nats; 0 where nothing is scored
    labels: list[int]  # -100 where nothing is scored


def score_tokens(model: Any, sequences: Sequence[Any], **options: Any) -> list[TokenScores]:
    """Score the tokens of sequences; the arguments and the noise are those of [`score_sequences`]."""
    return _score(model, sequences, _score_tokens_of_batch, **options)


def _score(
    model: Any,
    sequences: Sequence[Any],
    score: Any,
    *,
    indices: Sequence[int] | None = None,
    estimator: str = "stratified",
    num_samples: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> list[Any]:
    """Score batches of sequences with `score`, and return the scores by index."""
    indices = range(len(sequences)) if indices is None else indices
    protocol = Protocol(estimator, num_samples, seed, len(sequences))
    scores: list[Any] = []
    was_training = isinstance(model, torch.nn.Module) and model.training
    if was_training:
        model.eval()
    try:
        with tqdm(total=len(indices), desc="scoring", leave=False, disable=not progress) as bar:
            for batch in batches_of(sequences, indices, batch_size):
                scores += score(model, batch, protocol, device=device)
                bar.update(len(batch.indices))
    finally:
        if was_training:
            model.train()
    return sorted(scores)


class Batch(NamedTuple):
    """Sequences of one length, and their places in the dataset."""

    indices: list[int]
    rows: list[Any]


class Protocol(NamedTuple):
    """The protocol by which the sequences of a dataset are scored."""

    estimator: str
    num_samples: int
    seed: int
    num_sequences: int  # of the dataset


def batches_of(sequences: Sequence[Any], indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Batches of sequences of one length: a sequence's draws depend on its length, which padding would change."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1.")
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


def score_batch(
    model: Any, batch: Batch, protocol: Protocol, *, device: torch.device | str | None = None
) -> list[SequenceScore]:
    """Score some sequences of a dataset; each one's noise depends on its index and the protocol only."""
    nll, mask, _ = _score_batch(model, batch, protocol, device)
    sums = (nll.double() * mask).sum(1).tolist()
    return list(map(SequenceScore, batch.indices, sums, mask.long().sum(1).tolist()))


def _score_tokens_of_batch(
    model: Any, batch: Batch, protocol: Protocol, *, device: torch.device | str | None = None
) -> list[TokenScores]:
    nll, mask, ids = _score_batch(model, batch, protocol, device)
    nll, labels = nll.double().masked_fill(~mask.bool(), 0.0), ids.masked_fill(~mask.bool(), -100)
    return list(map(TokenScores, batch.indices, nll.tolist(), labels.tolist()))


@torch.no_grad()
def _score_batch(
    model: Any, batch: Batch, protocol: Protocol, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NLL, mask of scored tokens, and token ids, each `(batch, length)`."""
    device = _device_of(model) if device is None else torch.device(device)
    inputs = batch_of(batch.rows, device)
    arguments = _DRAWS.get(protocol.estimator, _own_draws)(model, batch.indices, inputs, protocol)
    return *model.token_nll(inputs.input_ids, inputs.attention_mask, **arguments), inputs.input_ids


def _own_draws(model: Any, indices: list[int], inputs: "ScoringBatch", protocol: Protocol) -> dict[str, Any]:
    """Arguments of `token_nll`: its own estimator, with a source of noise for each sequence."""
    device = inputs.input_ids.device
    return {
        "estimator": protocol.estimator,
        "num_samples": protocol.num_samples,
        "generator": [torch.Generator(device).manual_seed(derived_seed(protocol.seed, index)) for index in indices],
        **inputs.context,
    }


def _published_draws(model: Any, indices: list[int], inputs: "ScoringBatch", protocol: Protocol) -> dict[str, Any]:
    """Arguments of `token_nll`: the paper's draw of noise; the first token is given, whatever the configuration."""
    length = inputs.input_ids.shape[1]
    blocks = model.config.num_blocks(length)
    noise = published_noise(indices, protocol.num_sequences, num_blocks=blocks, length=length, seed=protocol.seed)
    labels = inputs.context.get("labels", inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)).clone()
    labels[:, 0] = -100
    return {"estimator": "sampled", "num_samples": protocol.num_samples, "noise": noise, "labels": labels}


#: Estimators that are none of the model's.
_DRAWS = {"published": _published_draws}


def published_noise(
    indices: Sequence[int], num_sequences: int, *, num_blocks: int, length: int, seed: int = 0
) -> Noise:
    """The noise of the sequences at `indices` of a dataset, as the published evaluation draws it.

    The dataset is shuffled and cut into batches of 16. The N blocks of a batch get one time from each N-th of the
    interval, in order: the k-th sequence has all its times in [k / 16, (k + 1) / 16). A sequence's own numbers depend
    on the seed and its index only.

    Args:
        num_sequences: of the dataset; its last batch may be smaller.
        num_blocks, length: of each sequence.
    """
    places = _shuffled(num_sequences, seed)
    blocks, tokens = [], []
    for index in indices:
        first = int(places[index]) // PUBLISHED_BATCH * PUBLISHED_BATCH
        size = min(PUBLISHED_BATCH, num_sequences - first)
        uniform = torch.rand(num_blocks + length, generator=torch.Generator().manual_seed(derived_seed(seed, index)))
        stratum = (int(places[index]) - first) * num_blocks + torch.arange(num_blocks)
        blocks.append((uniform[:num_blocks] + stratum) / (size * num_blocks))
        tokens.append(uniform[num_blocks:])
    block_noise = torch.stack(blocks)
    return Noise(block_noise, torch.stack(tokens), torch.zeros_like(block_noise))


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: int) -> torch.Tensor:
    """The place of each sequence in the shuffled dataset."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).argsort()


def check_estimator(model: Any, estimator: str, num_samples: int = 1) -> None:
    """Refuse an estimator that the model does not have, by scoring a text of two blocks.

    Raises:
        ValueError: the model's own reason, such as an exact sum that takes too many passes.
    """
    if estimator in _DRAWS and "noise" not in inspect.signature(model.token_nll).parameters:
        raise ValueError(
            f"estimator={estimator!r} gives a model its noise, and the token_nll of {type(model).__name__} takes "
            f"none: choose another estimator."
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
        ValueError: nothing was scored.
    """
    ordered = sorted({score.row: score for score in scores}.values())
    num_tokens = sum(score.num_tokens for score in ordered)
    if not num_tokens:
        raise ValueError(
            f"{len(ordered)} sequences hold no scored token, so there is no perplexity: give longer or more text."
        )
    nll = math.fsum(score.nll for score in ordered) / num_tokens
    count = len(ordered)
    spread = math.fsum((score.nll - nll * score.num_tokens) ** 2 for score in ordered)
    error = math.sqrt(count / (count - 1) * spread) / num_tokens if count > 1 else math.nan
    bits = nll / math.log(2)
    return Perplexity(
        nll=nll,
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        bits_per_token=bits,
        bits_per_byte=None if bytes_per_token is None else bits / bytes_per_token,
        standard_error=error,
        num_tokens=num_tokens,
        num_sequences=count,
        seconds=seconds,
    )


def unigram_perplexity(train_ids: Iterable[int], eval_ids: Iterable[int], vocab_size: int) -> float:
    """Perplexity of the model that ignores context: frequencies of the training tokens, with one added to each count.

    Args:
        train_ids: token ids of the training text, any shape.
        eval_ids: the tokens to score, see [`scored_tokens`].
        vocab_size: number of ids, which smoothing shares one count each.

    Raises:
        ValueError: nothing to score, or an id outside the vocabulary.
    """
    counts = [_counts(ids, vocab_size) for ids in (train_ids, eval_ids)]
    if not counts[1].sum():
        raise ValueError("eval_ids is empty: give at least one token to score.")
    log_probability = (counts[0] + 1).log() - (counts[0].sum() + vocab_size).log()
    nll = -(counts[1] * log_probability).sum() / counts[1].sum()
    return math.exp(nll.item())


def count_scored_tokens(
    model: Any, sequences: Sequence[Any], *, batch_size: int = 8, device: torch.device | str | None = None
) -> torch.Tensor:
    """The token ids `(num_tokens,)` of `sequences` that `model` scores, on the CPU: no padding, no given first token.

    A baseline that is compared with the model must score the same tokens. Costs one cheap pass.
    """
    device = _device_of(model) if device is None else torch.device(device)
    found = []
    with torch.no_grad():
        for start in range(0, len(sequences), batch_size):
            rows = [sequences[index] for index in range(start, min(start + batch_size, len(sequences)))]
            input_ids, attention_mask, context = batch_of(rows, device)
            mask = model.token_nll(input_ids, attention_mask, estimator="sampled", num_samples=1, **context).mask
            found.append(input_ids[mask.bool()].cpu())
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


class ScoringBatch(NamedTuple):
    """Stacked sequences, padded on the right; all tensors `(batch, length)`, int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor  # 0 over padding
    context: dict[str, torch.Tensor]  # `labels`, where -100 marks tokens that are given; empty if there are none


def batch_of(rows: Sequence[Any], device: torch.device | str = "cpu") -> ScoringBatch:
    """Stack sequences of any length.

    Args:
        rows: mappings with `input_ids` and perhaps `attention_mask` and `labels`, or plain sequences of ids.
    """

    def stack(column: list[torch.Tensor], padding: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding).to(device)

    given: list[Mapping[str, Any]] = [row if isinstance(row, Mapping) else {"input_ids": row} for row in rows]
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in given]
    masks = [
        torch.as_tensor(row.get("attention_mask", torch.ones_like(x)), dtype=torch.long)
        for row, x in zip(given, ids, strict=True)
    ]
    labels = [torch.as_tensor(row.get("labels", x), dtype=torch.long) for row, x in zip(given, ids, strict=True)]
    has_context = any(bool(((y == -100) & (mask == 1)).any()) for y, mask in zip(labels, masks, strict=True))
    return ScoringBatch(stack(ids, 0), stack(masks, 0), {"labels": stack(labels, -100)} if has_context else {})


def _counts(ids: Iterable[int], vocab_size: int) -> torch.Tensor:
    flat = torch.as_tensor(ids if isinstance(ids, torch.Tensor) else list(ids), dtype=torch.long).flatten()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < vocab_size:
        raise ValueError(f"token id {int(flat.max())} is outside the vocabulary of {vocab_size} ids.")
    return torch.bincount(flat, minlength=vocab_size).double()


def _device_of(model: Any) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


class HeldOutLoss(NamedTuple):
    """The training objective on text that was not trained on."""

    loss: float  # mean per labelled token, nats
    standard_error: float  # of loss: sequences as a random sample of text, noise draws included
    num_tokens: int  # labelled tokens
    num_sequences: int
    seconds: float


@torch.no_grad()
def sequence_losses(
    model: Any,
    sequences: Sequence[Any],
    *,
    indices: Sequence[int] | None = None,
    num_samples: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> list[SequenceScore]:
    """The loss of the sequences at `indices` (all by default), so that several processes can share the work.

    Every sequence has its own source of noise, a function of `seed` and its place: neither batch size nor the number
    of processes changes the result. The model's train or eval mode is restored.

    Args:
        model: its `forward` gives a mean loss per labelled token, and takes the noise of each row; `config.num_blocks`
            tells how many uniform numbers that is.
        sequences: a dataset with `input_ids` (and `attention_mask`, `labels`), or sequences of token ids.
        num_samples: noise draws per sequence.
        batch_size: draws that are computed at once.

    Raises:
        ValueError: a batch size below 1, or sequences that the model cannot learn from.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1.")
    indices = range(len(sequences)) if indices is None else indices
    device = next(iter(model.parameters())).device
    was_training = model.training
    model.eval()
    scores = []
    try:
        for index in tqdm(indices, desc="losses", leave=False, disable=not progress):
            input_ids, attention_mask, context = batch_of([sequences[index]], device)
            labels = context.get("labels", input_ids).masked_fill(attention_mask == 0, -100)
            count = int((labels != -100).sum())
            noise = _noise(model, input_ids.shape[1], num_samples, derived_seed(seed, int(index)))
            total = 0.0
            for first in range(0, num_samples, batch_size):
                part = [field[first : first + batch_size] for field in noise]
                rows = len(part[0])
                loss = model(
                    input_ids=input_ids.expand(rows, -1),
                    attention_mask=attention_mask.expand(rows, -1),
                    labels=labels.expand(rows, -1),
                    **{name: field.to(device) for name, field in zip(Noise._fields, part, strict=True)},
                ).loss
                total += float(loss) * rows
            scores.append(SequenceScore(int(index), total / num_samples * count, count))
    finally:
        model.train(was_training)
    return sorted(scores)


def _noise(model: Any, length: int, draws: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = model.config.num_blocks(length)
    return list(torch.rand((draws, 2 * blocks + length), generator=generator).split([blocks, length, blocks], dim=1))


def summarize_losses(scores: Iterable[SequenceScore], *, seconds: float = 0.0) -> HeldOutLoss:
    """Combine the losses of sequences; their order does not matter, and a row that occurs twice counts once.

    Raises:
        ValueError: no sequence has a labelled token.
    """
    mean = summarize(scores, seconds=seconds)
    return HeldOutLoss(mean.nll, mean.standard_error, mean.num_tokens, mean.num_sequences, seconds)


__all__ = [
    "Batch",
    "HeldOutLoss",
    "PUBLISHED_BATCH",
    "Perplexity",
    "Protocol",
    "ScoringBatch",
    "SequenceScore",
    "batch_of",
    "batches_of",
    "check_estimator",
    "count_scored_tokens",
    "perplexity",
    "published_noise",
    "score_batch",
    "score_sequences",
    "sequence_losses",
    "summarize",
    "summarize_losses",
    "unigram_perplexity",
]
