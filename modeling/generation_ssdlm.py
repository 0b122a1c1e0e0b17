"""Text from SSD-LM, block by block (arXiv 2210.17432, Sec. 3.3), as transformers' own `generate`."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.modeling_outputs import ModelOutput

from .canvas_bd3lm import StopRules
from .continuing_bd3lm import ContinuingMixin, pad_left
from .decoding_ssdlm import SimplexDraws, SimplexWriter, lay_out_behind, of_tokens
from .draws_bd3lm import check_sources
from .generation_config_ssdlm import SSDLMGenerationConfig, check_simplex_fields


@dataclass
class SSDLMGenerateOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` returns.

    Args:
        sequences: `(batch, prompt + new)`, the prompt as given and what was written.
        scores: with `output_scores`, for each new token the processed scores `(batch, vocab_size)` of its last step,
            of which it is the largest.
        logits: with `output_logits`, the same before processing.
        num_forward_passes: passes of the network, `num_denoising_steps` for each block.
        tokens_per_forward: new tokens, finished rows' padding left out, per row and pass.
    """

    sequences: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: float | None = None


class SSDLMGenerationMixin(ContinuingMixin):
    """`generate` for simplex diffusion. `generator` may be a list with one for each row of the batch."""

    generation_config_class = SSDLMGenerationConfig
    draws_class = SimplexDraws  # where the random numbers of a call come from

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[Any, dict]:
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        check_simplex_fields(prepared)
        return prepared, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = {
            "past_key_values": model_kwargs.get("past_key_values"),
            "cache_implementation": generation_config.cache_implementation,
        }
        unfit = [name for name, value in given.items() if value is not None]
        if unfit:
            raise ValueError(
                f"generate does not take {', '.join(unfit)}: the encoder of an SSD-LM attends from the context to the "
                f"noisy block, so that nothing of it can be kept. Leave it out."
            )

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        # The projection has the nucleus.
        top_p, generation_config.top_p = generation_config.top_p, 1.0
        try:
            return super()._get_logits_processor(generation_config, *args, **kwargs)
        finally:
            generation_config.top_p = top_p

    @torch.no_grad()
    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> SSDLMGenerateOutput | torch.Tensor:
        """Write block after block.

        1. Lay the prompts out so that they end together; the first block follows.
        2. For each block: denoise it behind its context.
        3. Cut rows where a stopping criterion holds; show the block to the streamer.
        4. Put prompts and new tokens together.
        """
        # 1. Lay out
        home, input_ids = input_ids.device, input_ids.to(self.device)
        attention_mask = model_kwargs.get("attention_mask")
        attention_mask = None if attention_mask is None else attention_mask.to(self.device)
        self._check_continuable(input_ids, attention_mask, synced_gpus)
        check_sources(model_kwargs.get("generator"), len(input_ids))
        prompt, padding = pad_left(input_ids, attention_mask)
        canvas = lay_out_behind(prompt, padding, generation_config.max_length - input_ids.shape[1], self.config)
        stop = StopRules(stopping_criteria, prompt, canvas, generation_config, padding)
        draws = self.draws_class(model_kwargs.get("generator"), greedy=not generation_config.do_sample)
        writer = SimplexWriter(self, canvas, prompt, logits_processor, generation_config, draws)
        for begin in canvas.blocks():
            # 2. Denoise
            writer.denoise(begin, stop.finished)
            # 3. Stop and stream
            shown = stop.update(begin)
            if streamer is not None and shown.numel():
                streamer.put(shown.cpu())
            if stop.all_finished:
                break
        if streamer is not None:
            streamer.end()
        # 4. Assemble
        sequences = torch.cat([input_ids, stop.new_tokens()], dim=1).to(home)
        if not generation_config.return_dict_in_generate:
            return sequences
        count = sequences.shape[1] - input_ids.shape[1]
        return SSDLMGenerateOutput(
            sequences=sequences,
            scores=of_tokens(writer.scores, count),
            logits=of_tokens(writer.logits, count),
            num_forward_passes=writer.count,
            tokens_per_forward=float(stop.lengths.sum()) / writer.count / len(input_ids),
        )


__all__ = ["SSDLMGenerateOutput", "SSDLMGenerationConfig", "SSDLMGenerationMixin"]
