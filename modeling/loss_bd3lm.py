"""The negative evidence lower bound of block diffusion, per token (arXiv 2503.09573, Eq. 8 and Algorithm 1).

For a block x_0^b given the clean blocks before it,

    -log p(x_0^b | x_0^<b)  <=  E_t E_{x_t}  w(t) * sum over masked positions of -log p(x_0 | x_t^b, x_0^<b),

with w(t) = alpha'_t / (1 - alpha_t), which is 1/t for the log-linear schedule. SUBS parameterisation: the mask token
has probability zero, and unmasked tokens are carried over, so they add nothing.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers.configuration_utils import PreTrainedConfig

from .attention_bd3lm import Layout, token_layout
from .configuration_bd3lm import SAMPLING_EPS
from .head_bd3lm import weighted_cross_entropy
from .noise_bd3lm import Noise, check_draws, clips, draw_noise, mask_positions, mask_positions_within, per_token, times
from .schedules_bd3lm import LogLinearNoise, noise_schedule
from .streams_bd3lm import noisy_hidden


if TYPE_CHECKING:
    from .modeling_bd3lm import BD3LMForMaskedLM


class Scored(NamedTuple):
    """Which tokens of a batch take part in the loss; all bool `(batch, length)`."""

    counted: torch.Tensor  # in the denominator of the mean
    maskable: torch.Tensor  # may be masked
    valid: torch.Tensor  # no padding


def denoising_loss(
    model: "BD3LMForMaskedLM",
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    noise: Noise | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The objective of Algorithm 1 in nats per token: a scalar with a gradient, the mean over all draws of noise.

    1. Which tokens count: labels other than -100. The first token of a sequence is never masked under
       `config.ignore_bos`; as published it still counts in the mean of training, not in that of evaluation.
    2. A time t for each block, from the model's interval in train mode, from [1e-3, 1] in eval mode. The draws of a
       sequence are those of `noise`, or `config.noise_draws` in train mode and one in eval mode.
    3. x_t of each draw, beside one clean stream for all of them, and the logits of masked positions only.
    4. The weighted cross-entropy, divided by the number of counted tokens or by `num_items_in_batch`.

    With an interval [beta, omega] other than [1e-3, 1] the value is no bound: it covers only a part of the noise
    levels, and its weight is as published, not as in the paper. There a clipped schedule has mask rates
    beta + (omega - beta) t for t over [0, 1], so alpha' is a constant of the interval (Sec. 5.2 states it as
    1/(beta - omega)) and scales all weights alike. The published code leaves this constant out: the weight stays w(t),
    and is 1 throughout when the interval starts above 0.5. One constant for all tokens changes no minimum, and Adam
    divides it out again; it does change the size of the loss, and of the gradient that `max_grad_norm` is compared
    with.
    """
    config = model.config
    check_text(model, input_ids, labels)
    # 1. Which tokens count
    layout = token_layout(attention_mask, input_ids.shape[1], config.block_size, device=input_ids.device)
    scored = scored_tokens(layout, labels, ignore_bos=config.ignore_bos, training=model.training)
    # 2. and 3. Noise, logits of the masked positions
    low, high = _interval(model)
    masked, weights, move_chance = corrupt(model, layout, scored, noise, low, high)
    draws = masked.shape[1] // input_ids.shape[1]
    check_draws(draws, config.time_conditioning)
    rows = masked.flatten().nonzero().squeeze(1)
    x_t = torch.where(masked, config.mask_token_id, input_ids.repeat(1, draws))
    hidden = noisy_hidden(model, x_t, input_ids, layout, rows, sigma_of(config, move_chance), draws=draws)
    # 4. Weighted cross-entropy
    targets, coefficients = labels.repeat(1, draws).flatten()[rows], weights.flatten()[rows] / draws
    total = weighted_cross_entropy(hidden, model.get_output_embeddings(), targets, coefficients, config.mask_token_id)
    count = scored.counted.sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


def scored_tokens(layout: Layout, labels: torch.Tensor, *, ignore_bos: bool, training: bool) -> Scored:
    """Which tokens count and which may be masked, from labels `(batch, length)` and padding."""
    valid = torch.ones_like(labels, dtype=torch.bool) if layout.valid is None else layout.valid
    counted = (labels != -100) & valid
    if not ignore_bos:
        return Scored(counted, counted, valid)
    later = counted & (layout.position_ids > 0)
    return Scored(counted if training else later, later, valid)


def corrupt(
    model: "BD3LMForMaskedLM",
    layout: Layout,
    scored: Scored,
    noise: Noise | None,
    low: float,
    high: float,
    *,
    training: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw the masked positions of a batch.

    Args:
        training: whether `config.resample` confines the mask rates, as it does in training; the model's mode by
            default.

    Returns:
        bool `(batch, draws * length)`, masked positions of the draws side by side; as many weights, of each position's
        loss; `(batch, draws * num_blocks)`, masking probabilities.
    """
    config = model.config
    batch, length = scored.counted.shape
    device, blocks = scored.counted.device, config.num_blocks(length)
    if noise is None:
        draws = config.noise_draws if model.training else 1
        noise = draw_noise(batch, blocks, length, draws=draws, order=config.antithetic_sampling, device=device)
    # Side by side, the draws of a sequence are one long row of draws * blocks blocks.
    draws, noise = noise.draws, noise.side_by_side()
    block_ids = torch.cat([layout.block_ids + draw * blocks for draw in range(draws)], dim=1)
    level = noise_schedule(config.noise)(times(noise.block_noise.to(device), low, high))
    confined = config.resample and (model.training if training is None else training) and clips(low, high)
    if confined:
        masked = mask_positions_within(noise, level.move_chance, block_ids, scored.valid.repeat(1, draws), low, high)
    else:
        masked = mask_positions(noise, level.move_chance, block_ids)
    weights = torch.ones_like(level.move_chance) if low > 0.5 else -level.loss_scaling
    return masked & scored.maskable.repeat(1, draws), per_token(weights, block_ids), level.move_chance


def _interval(model: "BD3LMForMaskedLM") -> tuple[float, float]:
    if model.training:
        return model.interval()
    # At block size 1 a full mask is the whole bound: the exact autoregressive likelihood.
    return (1.0, 1.0) if model.config.block_size == 1 else (SAMPLING_EPS, 1.0)


def sigma_of(config: PreTrainedConfig, move_chance: torch.Tensor | None) -> torch.Tensor | None:
    """The noise level of a sequence, as published that of its first block."""
    if not config.time_conditioning or move_chance is None:
        return None
    return LogLinearNoise().sigma(move_chance[:, 0])


def check_token_ids(input_ids: torch.Tensor | None, vocab_size: int, name: str) -> None:
    """Refuse ids outside the vocabulary while the error can still be understood.

    On an accelerator the look would cost a synchronisation per step, and the device's own assertion catches it.

    Raises:
        ValueError: an id below 0 or not below `vocab_size`.
    """
    if input_ids is None or torch.compiler.is_compiling() or input_ids.device.type != "cpu" or not input_ids.numel():
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} holds the id {low if low < 0 else high}, outside the vocabulary of {vocab_size} ids (0 to "
            f"{vocab_size - 1}): use the tokenizer that the model was trained with."
        )


def check_text(model: "BD3LMForMaskedLM", input_ids: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse what cannot be scored. Skipped on accelerators and under compilation, where a look would synchronise.

    Raises:
        ValueError: ids outside the vocabulary, labels of another shape, mask tokens to be predicted.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not match input_ids of shape {tuple(input_ids.shape)}."
        )
    if torch.compiler.is_compiling() or input_ids.device.type != "cpu":
        return
    mask = model.config.mask_token_id
    check_token_ids(input_ids, model.config.vocab_size, "input_ids")
    check_token_ids(labels[labels != -100], model.config.vocab_size, "labels")
    if (labels == mask).any():
        raise ValueError(
            f"labels hold mask_token_id={mask}: the model gives the mask no probability, so it cannot be scored. Set "
            f"such labels to -100, or use a tokenizer whose text never contains the mask."
        )


__all__ = ["Scored", "check_text", "check_token_ids", "corrupt", "denoising_loss", "scored_tokens", "sigma_of"]
