"""Requests with the same settings, generated together: one call of `generate` for the next blocks of all of them.

Rows join and leave between blocks. Each row's keys and values of finished blocks go with it, so nothing is read twice:
the caches of a group's rows are put side by side again whenever its rows change.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from bd3lm_hf.checkpoints import window_of
from bd3lm_hf.generation.text_generation import pad_left
from bd3lm_hf.modeling.cache_bd3lm import BlockCache
from bd3lm_hf.modeling.decoding_state_bd3lm import BlockCriteria
from bd3lm_hf.modeling.linear_bd3lm import PrepackedLinears
from bd3lm_hf.modeling.windows_bd3lm import fills_window
from bd3lm_hf.serving.requests import Request


ROUND_TOKENS = 32  # that a row gets before another group has its turn

_Row = tuple[Request, int]  # and the index of the first token of its text that the model still reads
_Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, (1, heads, tokens, head_dim)


class RowGroup:
    """The running requests with one set of settings.

    How far a call goes depends on the model:
    - A block-diffusion model ends its call after any block, and keeps the cache.
    - One that has no cache of blocks (SSD-LM, time-conditioned models) does the same, and reads the text again.
    - One whose block fills the window denoises a text as a whole; only rows of equal length share a call.
    - An autoregressive model draws all rows with one generator: when sampled, a row is alone in its calls, which have
      a fixed length, so that its text does not depend on what else is served.

    Args:
        model: in evaluation mode.
        tokenizer: decodes the text of the requests.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.rows: list[Request] = []
        self.block_size = int(getattr(model.config, "block_size", None) or 1)
        self.window = window_of(model)
        if getattr(model.config, "has_learned_positions", False):
            # A call asks for whole blocks after the longest row, which must have positions too.
            self.window = min(self.window, model.config.max_position_embeddings // self.block_size * self.block_size)
            self.window -= self.block_size
        self.in_one_piece = self.block_size >= self.window
        self.per_row: bool = model.generator_per_row
        self.has_block_cache = _has_block_cache(model)
        self._cache: tuple[list[_Row], Any] | None = None  # of the last call, and its rows

    def accepts(self, request: Request) -> bool:
        """Return whether a request can join now without a change of anybody's text."""
        first = self.rows[0]
        if first.key != request.key or (not self.per_row and (request.config.do_sample or _ends_early(request))):
            return False
        return not self.in_one_piece or (first.remaining == request.remaining and not first.written)

    def remove(self, gone: list[Request]) -> None:
        """Let requests leave."""
        self.rows = [request for request in self.rows if request not in gone]

    @torch.inference_mode()
    def write(self, wants_turn: Callable[[], bool]) -> int:
        """Generate until a row ends or is cancelled, or until `wants_turn()` after a block. Rows take their tokens.

        Returns:
            the number of blocks of the call.
        """
        rows = [(request, self._start(request)) for request in self.rows]
        texts = [(request.prompt + request.written)[start:] for request, start in rows]
        blocks = self._blocks(texts)
        # Whether a call may end after any block without a change of the text.
        can_pause = self.per_row and not self.in_one_piece
        turn = _Turn(self.rows, self.tokenizer, blocks, wants_turn if can_pause else lambda: False)
        cache = self._take_cache(rows, texts)
        for request in self.rows:
            request.reseed()
        generators: Any = [request.generator for request in self.rows]
        output = self.model.generate(
            **pad_left(texts, self.model.device),
            generation_config=_call_config(self.rows[0].config, self._most_tokens(blocks)),
            generator=generators if self.per_row else generators[0],
            stopping_criteria=StoppingCriteriaList([turn]),
            **({} if cache is None else {"past_key_values": cache}),
        )
        turn.settle()
        kept = getattr(output, "past_key_values", None)
        if kept is not None and kept.get_seq_length() and (self.has_block_cache or len(self.rows) == 1):
            self._cache = (rows, kept)
        return turn.num_blocks

    def _most_tokens(self, blocks: int | None) -> int:
        longest = max(request.remaining for request in self.rows)
        if blocks is None:
            return longest
        # Whole blocks, as in a batch: a block of which less is requested would be denoised differently.
        return min(-(-longest // self.block_size) + 1, blocks) * self.block_size

    def _blocks(self, texts: list[list[int]]) -> int | None:
        """Return after how many blocks the call ends at the latest; None: at the end of the text."""
        if self.in_one_piece:
            return None
        if not self.per_row:
            return ROUND_TOKENS
        # No row outgrows its window within a call.
        size = self.block_size
        return max(1, (self.window - max(map(len, texts)) // size * size) // size)

    def _start(self, request: Request) -> int:
        """Return the first token of a row that the model still reads, a function of the row's length alone.

        With a cache, the window of a text that has outgrown it moves by a quarter, and is read again only then.
        """
        length, size = len(request.prompt) + len(request.written), self.block_size
        if self.in_one_piece:
            return 0
        if request.written and getattr(request.config, "context", None) == "previous_block":
            return length - size  # what an SSD-LM reads after its first block
        exact = getattr(request.config, "window", None) == "exact" or (self.per_row and not self.has_block_cache)
        stride = size if exact else max(1, self.window // (4 * size)) * size
        too_many = length // size * size + size - self.window
        return max(0, -(-too_many // stride) * stride)

    def _take_cache(self, now: list[_Row], texts: list[list[int]]) -> Any:
        """Return the cache of what the rows have finished, up to the block before the one to be denoised."""
        (rows, cache), self._cache = self._cache or ([], None), None
        if rows == now:
            return cache
        if not self.has_block_cache:
            return None
        size, kept = self.block_size, _split_cache(rows, cache)
        # `generate` writes the last finished block together with the first step of the next one.
        finished = [text[: max(0, len(text) // size * size - size)] for text in texts]
        layers = [kept.get(row, []) for row in now]
        unread = [
            index
            for index, (own, text) in enumerate(zip(layers, finished, strict=True))
            if (own[0][0].shape[2] if own else 0) != len(text)
        ]
        if unread:
            with PrepackedLinears(self.model):
                for index in unread:
                    layers[index] = self._read(finished[index])
        ends = torch.tensor([len(text) // size * size for text in texts], device=self.model.device)
        return _join_caches(self.model, layers, ends.max() - ends)

    def _read(self, tokens: list[int]) -> _Layers:
        """Run finished blocks of one row, and return their keys and values."""
        network, cache = self.model.decoding_network(), BlockCache(self.model.config)
        ids = torch.tensor([tokens], device=self.model.device)
        positions = torch.arange(len(tokens), device=self.model.device).unsqueeze(0)
        network.hidden(ids, positions, None, None, cache=cache, num_committed=len(tokens))
        layers: list[Any] = cache.layers
        return [(layer.keys, layer.values) for layer in layers]


class _Turn(BlockCriteria):
    """Hands each block to its rows, and ends the call when one of them has ended or it is time for others."""

    def __init__(
        self, rows: list[Request], tokenizer: Any, most_blocks: int | None, wants_turn: Callable[[], bool]
    ) -> None:
        self.rows, self.tokenizer, self.most_blocks, self.wants_turn = list(rows), tokenizer, most_blocks, wants_turn
        self.num_blocks, self.ended = 0, False

    def end_block(self, new_tokens: list[list[int]], finished: list[bool]) -> bool:
        self.num_blocks += 1
        for request, tokens, has_ended in zip(self.rows, new_tokens, finished, strict=True):
            request.take(tokens, self.tokenizer, has_ended)
            request.reseed()
        over = [request.finish_reason is not None or request.cancelled.is_set() for request in self.rows]
        # A text that is denoised as a whole goes on while anybody wants it.
        may_leave = all(over) if self.most_blocks is None else any(over)
        self.ended = may_leave or self.num_blocks == self.most_blocks or self.wants_turn()
        return self.ended

    def settle(self) -> None:
        """End the rows of a call that `generate` has ended by a criterion which it does not tell of."""
        if not self.ended:
            for request in self.rows:
                request.take([], self.tokenizer, finished=True)


def _has_block_cache(model: Any) -> bool:
    return (
        hasattr(model, "decoding_network")
        and model.generator_per_row
        and not model.config.time_conditioning  # keys depend on the noise level
        and not fills_window(model.config)
        and model.generation_config.use_cache is not False
        and model.generation_config.cache_implementation in (None, "dynamic")
    )


def _ends_early(request: Request) -> bool:
    """Whether rows end by a criterion that transformers' own loop does not tell of."""
    return getattr(request.config, "entropy_stop", None) is not None or bool(
        getattr(request.config, "stop_at_second_eos", False)
    )


def _call_config(config: GenerationConfig, tokens: int) -> GenerationConfig:
    """Return the settings of one call, whose rows end by their own stop strings and limits."""
    made = copy.deepcopy(config)
    made.max_new_tokens, made.max_length, made.stop_strings = tokens, None, None
    made.return_dict_in_generate = True
    if made.pad_token_id is None:
        ends = made.eos_token_id
        made.pad_token_id = ends[0] if isinstance(ends, list) else 0 if ends is None else ends
    return made


def _split_cache(rows: list[_Row], cache: Any) -> dict[_Row, _Layers]:
    """Return the part of each row, views of a cache in which rows may begin at different columns."""
    if cache is None:
        return {}
    begins = [0] * len(rows) if cache.row_start is None else cache.row_start.tolist()
    parts = {}
    for index, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        part = (slice(index, index + 1), slice(None), slice(begin, None))
        parts[row] = [(layer.keys[part], layer.values[part]) for layer in cache.layers]
    return parts


def _join_caches(model: Any, rows: list[_Layers], starts: torch.Tensor) -> BlockCache:
    """Return one cache for rows that begin at the columns `starts` and end at the same one."""
    cache = BlockCache(model.config)
    example = max(rows, key=lambda layers: layers[0][0].shape[2] if layers else 0)
    for index, pair in enumerate(example):
        joined = []
        for kind, longest in enumerate(pair):
            # What is left of a row is never read, but a product with it must be finite.
            whole = longest.new_zeros(len(rows), *longest.shape[1:])
            for row, layers in enumerate(rows):
                if layers:
                    own = layers[index][kind][0]
                    whole[row, :, longest.shape[2] - own.shape[1] :] = own
            joined.append(whole)
        cache.update(joined[0], joined[1], index)
    cache.row_start = starts if starts.any() else None
    return cache
