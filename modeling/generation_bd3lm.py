"""Text from a block-diffusion model, block by block (arXiv 2503.09573, Algorithm 2), as transformers' own `generate`.

Only `_sample` is replaced, where greedy decoding and sampling both arrive; preparation, logits processors, stopping
criteria, streamers and the pipeline are transformers'.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.modeling_outputs import ModelOutput

from .attention_bd3lm import AttentionPlan, Tile, block_causal_plan, decoding_plan, token_layout
from .cache_bd3lm import BlockCache
from .noise_bd3lm import LogLinearNoise, noise_schedule
from .samplers_bd3lm import SAMPLERS, FirstHittingSampler


# Processors that read the scores only: they serve rows at different places in one call.
_PLACE_FREE = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)


class BD3LMGenerationConfig(GenerationConfig):
    """transformers' `GenerationConfig` with the fields of block diffusion.

    Args:
        sampler (`str`, defaults to `"first_hitting"`): which masked positions are revealed when.
        nucleus_p (`float`, defaults to 1.0): the paper's nucleus: a token stays while the cumulative probability
            *including itself* is at most p, so the token that crosses p is dropped (`top_p` keeps it). The most likely
            token always stays. The paper samples with 0.9.
        kwargs: fields of `GenerationConfig`. `top_k` defaults to 0 here: sampling draws from the whole distribution.

    Raises:
        ValueError: an unknown sampler or a `nucleus_p` outside (0, 1].
    """

    def __init__(self, **kwargs: Any) -> None:
        self.sampler = kwargs.pop("sampler", "first_hitting")
        self.nucleus_p = kwargs.pop("nucleus_p", 1.0)
        super().__init__(**kwargs)

    def validate(self, *args, **kwargs) -> None:
        super().validate(*args, **kwargs)
        check_generation_fields(self)

    @classmethod
    def from_model_config(cls, model_config):
        # transformers then calls the constructor. A config made from a model config forgets its own fields on reload.
        raise NotImplementedError("a BD3LMGenerationConfig is made by its constructor, not from a model config.")


def check_generation_fields(config: GenerationConfig) -> None:
    """Validate the fields that [`BD3LMGenerationConfig`] adds."""
    if config.sampler not in SAMPLERS:
        raise ValueError(f"sampler={config.sampler!r} is unknown: choose one of {', '.join(SAMPLERS)}.")
    if not 0.0 < config.nucleus_p <= 1.0:
        raise ValueError(
            f"nucleus_p={config.nucleus_p}: give a probability above 0 and at most 1 (1 keeps all tokens)."
        )


@dataclass
class BD3LMGenerateOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns.

    Args:
        sequences: `(batch, prompt + new)`, the prompt as given and what was written.
        scores: with `output_scores`, for each new token the processed scores `(batch, vocab_size)` it was drawn from.
        logits: with `output_logits`, the same before processing.
        past_key_values: the cache of finished blocks.
        num_forward_passes: denoising passes of the network; the pass over the prompt is not counted.
        tokens_per_forward: new tokens, finished rows' padding left out, per row and denoising pass.
    """

    sequences: torch.LongTensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    past_key_values: Cache | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: float | None = None


class NucleusLogitsProcessor(LogitsProcessor):
    """The nucleus of the published samplers: ranks whose cumulative probability, their own included, is at most p.

    The most probable token always stays. See [`BD3LMGenerationConfig`] for how it differs from `top_p`.
    """

    def __init__(self, nucleus_p: float) -> None:
        self.nucleus_p = nucleus_p

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ranked, order = scores.sort(dim=-1, descending=True)
        dropped = ranked.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1) > self.nucleus_p
        dropped[..., 0] = False
        return scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


@dataclass
class Canvas:
    """A batch of texts laid out so that the blocks of all rows end at the same columns.

    Row r's first token stands at column `start[r]`, a multiple of the block size; rows with fewer full prompt blocks
    start later. What is still to be written holds the mask token.
    """

    text: torch.Tensor  # (batch, columns)
    start: torch.Tensor  # (batch,), column of each row's first token
    prompt_lengths: list[int]
    block_size: int
    key_valid: torch.Tensor | None  # bool (batch, columns), None when all rows start at column 0

    @property
    def position_ids(self) -> torch.Tensor:
        """Rotary positions `(batch or 1, columns)`, counted from each row's first token."""
        columns = torch.arange(self.text.shape[1], device=self.text.device)
        if self.key_valid is None:
            return columns.unsqueeze(0)
        return (columns - self.start.unsqueeze(1)).clamp(min=0)

    def new_tokens(self, count: int) -> torch.Tensor:
        """What was written behind each row's prompt, `(batch, count)`; rows whose blocks end earlier repeat their end."""
        offset = self.start + torch.tensor(self.prompt_lengths, device=self.text.device)
        columns = offset.unsqueeze(1) + torch.arange(count, device=self.text.device)
        return self.text.gather(1, columns.clamp(max=self.text.shape[1] - 1))


def lay_out(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, new_tokens: int, block_size: int, mask_token_id: int
) -> Canvas:
    """Put prompts `(batch, length)`, padded on either side, on a [`Canvas`] with room for `new_tokens` each."""
    batch, width = input_ids.shape
    lengths = [width] * batch if attention_mask is None else attention_mask.sum(1).tolist()
    full = max(length // block_size for length in lengths)
    starts = [(full - length // block_size) * block_size for length in lengths]
    ends = [start + length + new_tokens for start, length in zip(starts, lengths, strict=True)]
    columns = -(-max(ends) // block_size) * block_size
    text = input_ids.new_full((batch, columns), mask_token_id)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tokens = input_ids[row] if attention_mask is None else input_ids[row][attention_mask[row].bool()]
        text[row, start : start + length] = tokens
    start = torch.tensor(starts, device=input_ids.device)
    valid = None
    if any(starts):
        valid = torch.arange(columns, device=input_ids.device) >= start.unsqueeze(1)
    return Canvas(text, start, lengths, block_size, valid)


@dataclass
class _Record:
    """Scores and logits of each new token, kept when asked for."""

    wanted: bool
    rows: dict[int, torch.Tensor] = field(default_factory=dict)

    def put(self, columns: torch.Tensor, active: torch.Tensor, values: torch.Tensor) -> None:
        if not self.wanted:
            return
        for row in active.nonzero().flatten().tolist():
            column = int(columns[row])
            if column not in self.rows:
                self.rows[column] = torch.zeros_like(values)
            self.rows[column][row] = values[row]

    def result(self, count: int) -> tuple[torch.Tensor, ...] | None:
        return tuple(self.rows[column] for column in range(count)) if self.wanted else None


class BD3LMGenerationMixin(GenerationMixin):
    """`generate` for block diffusion."""

    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    # --- Preparation, where transformers' own does not fit -----------------------------------------------------------

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        super().adjust_generation_fn(*args, **kwargs)
        # transformers reloads a plain GenerationConfig, and one made from config.json forgets its own fields on saving.
        fields = self.generation_config.to_dict()
        fields.pop("_from_model_config", None)
        known = {**BD3LMGenerationConfig().to_dict(), **{k: v for k, v in fields.items() if v is not None}}
        self.generation_config = BD3LMGenerationConfig(**known)
        self._adopt_special_tokens()

    def _adopt_special_tokens(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name, None))

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any):
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        asked = (kwargs.get("top_k"), getattr(generation_config, "top_k", None), self.generation_config.top_k)
        if all(top_k is None for top_k in asked):
            prepared.top_k = 0
        check_generation_fields(prepared)
        return prepared, model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, generator: torch.Generator | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Declares `generator` as an argument of `generate`: the source of all randomness of the call."""
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        name = generation_config.cache_implementation
        if name not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={name!r} does not fit block diffusion here: leave it out for the exact cache "
                f"of finished blocks, or set use_cache=False."
            )
        given = model_kwargs.get("past_key_values") is not None
        if self.config.time_conditioning:
            # The keys of finished blocks depend on the noise level of the step that reads them: nothing can be kept.
            if given:
                raise ValueError(
                    "past_key_values does not fit this model: with time_conditioning=True the keys of a text change with "
                    "the noise level. Leave the cache out."
                )
        elif generation_config.use_cache and not given:
            model_kwargs["past_key_values"] = BlockCache()

    def _get_logits_processor(self, generation_config, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if generation_config.nucleus_p < 1.0:
            processors.append(NucleusLogitsProcessor(generation_config.nucleus_p))
        return processors

    def generate_batch(self, *args, **kwargs):
        raise ValueError(
            "continuous batching (generate_batch, cache_implementation='paged') decodes autoregressively, which a "
            "block-diffusion model does not: call generate with a padded batch and its attention_mask."
        )

    @property
    def init_continuous_batching(self):
        raise AttributeError(f"{type(self).__name__} has no continuous batching: call generate.")

    # --- Decoding ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs: Any,
    ) -> BD3LMGenerateOutput | torch.LongTensor:
        """Write block after block (Algorithm 2).

        1. Lay the prompts out so that the blocks of all rows end together.
        2. For each block: draw the order of its masked positions, then reveal one per row and step. The first step also
           writes the block before it to the cache.
        3. Cut rows where a stopping criterion holds; show the block to the streamer.
        4. Put prompts and new tokens together.
        """
        # 1. Lay out
        self._check_prompt(input_ids, model_kwargs.get("attention_mask"), generation_config, synced_gpus)
        new_tokens = generation_config.max_length - input_ids.shape[1]
        canvas = lay_out(
            input_ids,
            model_kwargs.get("attention_mask"),
            new_tokens,
            self.config.block_size,
            self.config.mask_token_id,
        )
        run = _Run(self, canvas, input_ids, logits_processor, generation_config, model_kwargs)
        stop = _StopRules(stopping_criteria, input_ids, new_tokens, generation_config)
        for begin in run.blocks():
            # 2. Denoise
            run.denoise(begin, stop.finished, streamer)
            # 3. Stop and stream
            shown = stop.update(canvas, begin)
            if streamer is not None and shown.numel():
                streamer.put(shown.cpu())
            if stop.all_finished:
                break
        if streamer is not None:
            streamer.end()
        # 4. Assemble
        sequences = torch.cat([input_ids, stop.padded(canvas)], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        written = int(stop.lengths.sum())
        return BD3LMGenerateOutput(
            sequences=sequences,
            scores=run.scores.result(sequences.shape[1] - input_ids.shape[1]),
            logits=run.logits.result(sequences.shape[1] - input_ids.shape[1]),
            past_key_values=run.cache,
            num_forward_passes=run.num_forward_passes,
            tokens_per_forward=written / max(1, run.num_forward_passes) / input_ids.shape[0],
        )

    def _check_prompt(self, input_ids, attention_mask, generation_config, synced_gpus) -> None:
        """Refuse what cannot be continued, before any work."""
        config = self.config
        if synced_gpus:
            raise ValueError(
                "synced_gpus=True: generating from sharded weights (ZeRO-3, FSDP) is not supported; gather the model on "
                "one device first, or pass synced_gpus=False where every process holds whole weights."
            )
        lengths = [input_ids.shape[1]] if attention_mask is None else attention_mask.sum(1).tolist()
        if min(lengths) == 0:
            raise ValueError(
                "empty prompt: give every row at least one token, or call generate without input_ids to start from "
                "bos_token_id."
            )
        if max(lengths) > config.model_length:
            raise ValueError(
                f"the prompt has {max(lengths)} tokens, more than the model's window model_length={config.model_length}: "
                f"shorten it, for instance by tokenizer(..., truncation=True, max_length={config.model_length})."
            )
        real = input_ids if attention_mask is None else input_ids[attention_mask.bool()]
        outside = (real < 0) | (real >= config.vocab_size)
        if outside.any():
            raise ValueError(
                f"the prompt holds the id {int(real[outside][0])}, outside the vocabulary of {config.vocab_size} ids: use "
                f"the tokenizer that the model was trained with."
            )
        if (real == config.mask_token_id).any():
            raise ValueError(
                f"the prompt holds mask_token_id={config.mask_token_id}: generate continues a text and does not fill "
                f"gaps in it; model(input_ids).logits predicts masked tokens."
            )


class _Run:
    """The network's side of one `generate` call: passes over the canvas, and what they cost."""

    def __init__(self, model, canvas: Canvas, input_ids, logits_processor, generation_config, model_kwargs) -> None:
        self.model, self.canvas, self.config = model, canvas, model.config
        self.prompt_width = input_ids.shape[1]
        self.prompt = input_ids
        self.processors = logits_processor
        self.do_sample = generation_config.do_sample
        self.generator = model_kwargs.get("generator")
        self.cache: Cache | None = model_kwargs.get("past_key_values")
        self.sampler: FirstHittingSampler = SAMPLERS[generation_config.sampler]()
        self.num_forward_passes = 0
        self.scores = _Record(bool(generation_config.output_scores and generation_config.return_dict_in_generate))
        self.logits = _Record(bool(generation_config.output_logits and generation_config.return_dict_in_generate))
        self.modulations = None
        if not self.config.time_conditioning:
            self.modulations = model.backbone.modulations(None, canvas.text.device)
        self.position_ids = canvas.position_ids
        self.forbidden = self._forbidden_ids(generation_config)
        lengths = torch.tensor(canvas.prompt_lengths, device=canvas.text.device)
        self.output_shift = self.prompt_width - lengths - canvas.start  # canvas column -> output column
        self._dropped = 0  # oldest columns that have left the window
        self._check_cache()

    def _check_cache(self) -> None:
        if self.cache is None:
            return
        held = int(self.cache.get_seq_length())
        if held and (self.canvas.key_valid is not None or held % self.config.block_size):
            raise ValueError(
                f"past_key_values holds {held} tokens: a cache can be continued when it holds whole blocks and no row of "
                f"the batch is padded. Leave it out to start afresh."
            )
        if held > self.canvas.prompt_lengths[0]:
            raise ValueError(
                f"past_key_values holds {held} tokens but the prompt has {self.canvas.prompt_lengths[0]}: pass the whole "
                f"text so far as input_ids, the cached part included."
            )

    def _forbidden_ids(self, generation_config) -> list[int]:
        """The mask is never written; padding neither, unless it doubles as the end of a text."""
        ids = [self.config.mask_token_id]
        eos = generation_config.eos_token_id
        pad = generation_config.pad_token_id
        if pad is not None and pad not in (eos if isinstance(eos, list) else [eos]):
            ids.append(pad)
        return ids

    def blocks(self) -> range:
        """First columns of the blocks to be written."""
        size = self.config.block_size
        full = max(length // size for length in self.canvas.prompt_lengths)
        return range(full * size, self.canvas.text.shape[1], size)

    def denoise(self, begin: int, finished: torch.Tensor, streamer) -> None:
        """Reveal every masked token of the block that begins at this column, one per row and step."""
        size, text = self.config.block_size, self.canvas.text
        block = text[:, begin : begin + size]
        masked = (block == self.config.mask_token_id) & ~finished.unsqueeze(1)
        order = self.sampler.order(masked, random=self.do_sample, generator=self.generator)
        counts = masked.sum(1)
        steps = int(counts.max())
        t = torch.ones(text.shape[0], device=text.device)
        for step in range(steps):
            place, active = order[:, step], step < counts
            if self.config.time_conditioning:
                t = self.sampler.time(t, counts - step, random=self.do_sample, generator=self.generator)
            logits = self._forward(begin, place, t)
            tokens = self._choose(logits, begin + place, active)
            current = block.gather(1, place.unsqueeze(1)).squeeze(1)
            block.scatter_(1, place.unsqueeze(1), torch.where(active, tokens, current).unsqueeze(1))
            if hasattr(streamer, "put_draft"):
                streamer.put_draft(block[0][block[0] != self.config.mask_token_id].cpu())

    def _forward(self, begin: int, place: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, vocab_size)` of one place of the block per row."""
        model, size = self.model, self.config.block_size
        self.num_forward_passes += 1
        stored = 0 if self.cache is None else int(self.cache.get_seq_length()) + self._dropped
        rows = torch.arange(place.shape[0], device=place.device) * size + place
        modulations = self.modulations
        if modulations is None:
            sigma = LogLinearNoise().sigma(noise_schedule(self.config.noise).move_chance(t))
            modulations = model.backbone.modulations(sigma, place.device)
        if self.cache is None:
            first, commit, plan = self._window_plan(begin)
        else:
            if begin - stored > size:
                self._prefill(stored, begin, modulations)
                stored = begin
            first, commit = stored, begin - stored
            plan = self._step_plan(begin, commit)
        embeds = model.backbone.vocab_embed(self.canvas.text[:, first : begin + size])
        positions = self.position_ids[:, first : begin + size]
        hidden = model.backbone.run(
            embeds, positions, plan, modulations, past_key_values=self.cache, commit=commit, rows=rows
        ).last_hidden_state
        self._slide(begin)
        return model.get_output_embeddings()(hidden).float()

    def _prefill(self, first: int, stop: int, modulations) -> None:
        """Write finished blocks to the cache; nothing of their last layer but keys and values is needed."""
        valid = self.canvas.key_valid
        layout = token_layout(
            None if valid is None else valid[:, :stop],
            stop - first,
            self.config.block_size,
            past=first,
            device=self.canvas.text.device,
        )
        embeds = self.model.backbone.vocab_embed(self.canvas.text[:, first:stop])
        plan = block_causal_plan(
            layout,
            stop - first,
            self.config.block_size,
            implementation=self.config._attn_implementation,
            dtype=embeds.dtype,
        )
        plan = AttentionPlan(plan.tiles, (), stop - first)
        self.model.backbone.run(
            embeds,
            self.position_ids[:, first:stop],
            plan,
            modulations,
            past_key_values=self.cache,
            commit=stop - first,
        )

    def _step_plan(self, begin: int, finished: int) -> AttentionPlan:
        """Attention of a step behind the cache; the noisy block sees a window of at most `model_length` tokens."""
        size, past = self.config.block_size, begin - finished - self._dropped
        valid = self.canvas.key_valid
        if valid is not None:
            valid = valid[:, self._dropped : begin + size]
            valid = None if self._dropped >= int(self.canvas.start.max()) else valid
        hidden = max(0, past + finished + size - self.config.model_length)
        return decoding_plan(past, finished, size, valid, self.model.dtype, hidden=hidden)

    def _slide(self, begin: int) -> None:
        """Forget the oldest blocks, so that the next step fits into the window.

        Rotary attention depends on distances only, so keys rotated at their absolute position serve a moving window.
        """
        if self.cache is None:
            return
        held = int(self.cache.get_seq_length())
        excess = held + self.config.block_size - self.config.model_length
        if excess > 0 and isinstance(self.cache, BlockCache):
            for layer in self.cache.layers:
                layer.drop_first(excess)
            self._dropped += excess

    def _window_plan(self, begin: int) -> tuple[int, int, AttentionPlan]:
        """Without a cache: the whole window in every step, only the block queried in the last layer."""
        size = self.config.block_size
        first = max(0, begin + size - self.config.model_length)
        length = begin + size - first
        valid = self.canvas.key_valid
        valid = None if valid is None else valid[:, first : begin + size]
        layout = token_layout(valid, length, size, device=self.canvas.text.device)
        implementation, dtype = self.config._attn_implementation, self.model.dtype
        plan = block_causal_plan(layout, length, size, implementation=implementation, dtype=dtype)
        last: tuple[Tile, ...] = decoding_plan(length - size, 0, size, valid, dtype).last_tiles
        return first, 0, AttentionPlan(plan.tiles, last, length - size)

    def _choose(self, logits: torch.Tensor, columns: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """One token per row from its logits; `columns` are places on the canvas, all `(batch,)`."""
        columns = columns + self.output_shift
        logits[:, self.forbidden] = -torch.inf
        self.logits.put(columns - self.prompt_width, active, logits)
        scores = self._process(logits, columns, active)
        scores[:, self.forbidden] = -torch.inf
        self.scores.put(columns - self.prompt_width, active, scores)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator).squeeze(1)

    def _process(self, scores: torch.Tensor, columns: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Apply the logits processors, each row with the text to the left of its place as context.

        Processors judge by the width of the context, so rows at different columns are processed once per column. Tokens
        to the left that are not yet revealed stand in the context as mask tokens.
        """
        context = None
        for processor in self.processors:
            if isinstance(processor, (*_PLACE_FREE, NucleusLogitsProcessor)):
                scores = processor(self.prompt, scores)
                continue
            if context is None:
                places = columns[active].unique().tolist()
                context = self._output_view(max(places))
            for column in places:
                processed = processor(context[:, :column], scores.clone())
                scores = torch.where((columns == column).unsqueeze(1), processed, scores)
        return scores.clone() if len(self.processors) == 0 else scores

    def _output_view(self, width: int) -> torch.Tensor:
        """The first `width` columns of the output so far: prompts as given, then new tokens."""
        count = max(0, width - self.prompt_width)
        return torch.cat([self.prompt, self.canvas.new_tokens(count)], dim=1)[:, :width]


class _StopRules:
    """Where each row ends."""

    def __init__(self, criteria: StoppingCriteriaList, input_ids, new_tokens: int, generation_config) -> None:
        # Length is counted here, for rows whose blocks end at different lengths.
        self.criteria = StoppingCriteriaList(c for c in criteria if not isinstance(c, MaxLengthCriteria))
        self.prompt, self.new_tokens = input_ids, new_tokens
        batch, device = input_ids.shape[0], input_ids.device
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.all_finished = False
        pad, eos = generation_config.pad_token_id, generation_config.eos_token_id
        self.pad_token_id = pad if pad is not None else eos[0] if isinstance(eos, list) else eos
        if self.pad_token_id is None and batch > 1 and self.criteria:
            raise ValueError(
                "rows of a batch may stop at different lengths, and there is no token to pad them with: set "
                "pad_token_id (or eos_token_id) in the generation config."
            )

    def update(self, canvas: Canvas, begin: int) -> torch.Tensor:
        """Take in the block at column `begin`: judge each of its tokens as if they came one by one.

        Returns:
            the first row's new tokens, up to its end, for the streamer.
        """
        shown = int(self.lengths[0])
        offset = begin + canvas.block_size - canvas.start
        lengths = torch.tensor(canvas.prompt_lengths, device=offset.device)
        known = (offset - lengths).clamp(max=self.new_tokens)  # new tokens of each row that are written by now
        goal = torch.where(self.finished, self.lengths, known)
        if self.criteria:
            text = torch.cat([self.prompt, canvas.new_tokens(int(known.max()))], dim=1)
            running = ~self.finished
            for count in range(int(self.lengths[running].min()) + 1, int(known.max()) + 1):
                judged = ~self.finished & (count > self.lengths) & (count <= known)
                done = self.criteria(text[:, : self.prompt.shape[1] + count], None) & judged
                goal = torch.where(done, count, goal)
                self.finished |= done
        self.lengths = goal
        self.finished |= goal >= self.new_tokens
        self.all_finished = bool(self.finished.all())
        return canvas.new_tokens(int(self.lengths[0]))[0, shown:]

    def padded(self, canvas: Canvas) -> torch.Tensor:
        """New tokens of all rows `(batch, longest)`, padded behind each row's end."""
        longest = int(self.lengths.max())
        tokens = canvas.new_tokens(longest)
        behind = torch.arange(longest, device=tokens.device) >= self.lengths.unsqueeze(1)
        return tokens if self.pad_token_id is None else tokens.masked_fill(behind, self.pad_token_id)


__all__ = ["BD3LMGenerateOutput", "BD3LMGenerationConfig", "BD3LMGenerationMixin", "NucleusLogitsProcessor"]
