"""The negative evidence lower bound of block diffusion, per token (arXiv 2503.09573, Eq. 8 and Algorithm 1).

For a block x_0^b given the clean blocks before it,

    -log p(x_0^b | x_0^<b)  <=  E_t E_{x_t}  w(t) * sum over masked positions of -log p(x_0 | x_t^b, x_0^<b),

with w(t) = alpha'_t / (1 - alpha_t), which is 1/t for the log-linear schedule. SUBS parameterisation: the mask token
has probability zero, and unmasked tokens are carried over, so they add nothing.

The cross-entropy of the output head on the rows that need it, without a (batch, length, vocabulary) tensor.

Only masked positions carry a loss (SUBS: unmasked tokens are carried over), and their logits live in chunks. The mask
token has probability zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.configuration_utils import PreTrainedConfig

from .attention_bd3lm import Layout, token_layout
from .backbone_bd3lm import check_token_ids
from .configuration_bd3lm import SAMPLING_EPS
from .linear_bd3lm import call_as, is_plain_linear, is_sharded
from .noise_bd3lm import (
    LogLinearNoise,
    Noise,
    NoiseLevel,
    check_draws,
    clips,
    draw_noise,
    mask_exact_numbers,
    mask_positions,
    mask_positions_within,
    noise_schedule,
    per_token,
    times,
)


#: Makes logits `(rows, vocab_size)` of normed hidden states `(rows, hidden_dim)`.
LogitsHead = Callable[[torch.Tensor], torch.Tensor]


class DenoisingNetwork(Protocol):
    """What loss and likelihood read of a model; [`BD3LMLanguageModel`] implements it."""

    config: Any
    training: bool

    def noisy_hidden(
        self,
        x_t: torch.Tensor,
        x_0: torch.Tensor,
        layout: Layout,
        masked_indices: torch.Tensor,
        sigma: torch.Tensor | None,
        *,
        cache: Any = None,
        num_noise_samples: int = 1,
    ) -> torch.Tensor:
        """Return hidden states at the masked positions of the noisy streams."""

    def clean_cache(self, input_ids: torch.Tensor, layout: Layout) -> Any:
        """Return the cache of the clean stream."""

    def logits_head(self) -> LogitsHead:
        """Return the head, which the loss calls on chunks of hidden states."""


class LossMask(NamedTuple):
    """Which tokens of a batch take part in the loss; all bool `(batch, length)`."""

    counted: torch.Tensor  # in the denominator of the mean
    maskable: torch.Tensor  # may be masked
    valid: torch.Tensor  # no padding


def denoising_loss(
    model: DenoisingNetwork,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    noise: Noise | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    interval: tuple[float, float] = (SAMPLING_EPS, 1.0),
    position_ids: torch.Tensor | None = None,
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
    length, device = input_ids.shape[1], input_ids.device
    layout = token_layout(attention_mask, length, config.block_size, device=device, position_ids=position_ids)
    scored = loss_mask(layout, labels, ignore_bos=config.ignore_bos, training=model.training)
    # 2. and 3. Noise, logits of the masked positions
    low, high = interval if model.training else evaluation_interval(config)
    masked, weights, move_chance = corrupt(model, layout, scored, noise, low, high)
    draws = masked.shape[1] // length
    check_draws(draws, config.time_conditioning)
    rows = masked.flatten().nonzero().squeeze(1)
    x_t = torch.where(masked, config.mask_token_id, input_ids.repeat(1, draws))
    hidden = model.noisy_hidden(x_t, input_ids, layout, rows, sigma_of(config, move_chance), num_noise_samples=draws)
    # 4. Weighted cross-entropy
    targets, coefficients = labels.repeat(1, draws).flatten()[rows], weights.flatten()[rows] / draws
    total = chunked_cross_entropy(hidden, model.logits_head(), targets, coefficients, config)
    count = scored.counted.sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


def loss_mask(layout: Layout, labels: torch.Tensor, *, ignore_bos: bool, training: bool) -> LossMask:
    """Which tokens count and which may be masked, from labels `(batch, length)` and padding."""
    valid = torch.ones_like(labels, dtype=torch.bool) if layout.valid is None else layout.valid
    counted = (labels != -100) & valid
    if not ignore_bos:
        return LossMask(counted, counted, valid)
    later = counted & (layout.position_ids > 0)
    return LossMask(counted if training else later, later, valid)


def corrupt(
    model: DenoisingNetwork,
    layout: Layout,
    scored: LossMask,
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
    config, training = model.config, model.training if training is None else training
    batch, length = scored.counted.shape
    device, blocks = scored.counted.device, _num_blocks(layout, config)
    if noise is None:
        draws = config.noise_draws if model.training else 1
        noise = draw_noise(batch, blocks, length, draws=draws, order=config.antithetic_sampling, device=device)
    elif noise.block_noise.shape[-1] < blocks:
        raise ValueError(
            f"block_noise of shape {tuple(noise.block_noise.shape)} does not fit {blocks} blocks of packed documents: "
            f"give one column for each, or leave the noise out."
        )
    # Side by side, the draws of a sequence are one long row of draws * blocks blocks.
    draws, noise = noise.draws, noise.side_by_side()
    blocks = noise.block_noise.shape[1] // draws
    block_ids = torch.cat([layout.block_ids + draw * blocks for draw in range(draws)], dim=1)
    maskable = scored.maskable.repeat(1, draws)
    if config.masking == "exact_k":
        masked, weights = mask_exact_numbers(noise, block_ids, maskable, low, high)
        return masked, per_token(weights, block_ids), torch.zeros_like(weights)
    level = noise_schedule(config.noise)(times(noise.block_noise.to(device), low, high))
    if config.resample and training and clips(low, high):
        masked = mask_positions_within(noise, level.move_chance, block_ids, scored.valid.repeat(1, draws), low, high)
    else:
        masked = mask_positions(noise, level.move_chance, block_ids)
    weights = torch.ones_like(level.move_chance) if low > 0.5 else -level.loss_scaling
    found = (masked & maskable, per_token(weights, block_ids), level.move_chance)
    return (
        _with_complements(found, level, block_ids, maskable, low) if config.complementary and model.training else found
    )


def _num_blocks(layout: Layout, config: PreTrainedConfig) -> int:
    """Blocks of a row; packed documents may have more of them, as each ends with a shorter one."""
    usual = config.num_blocks(layout.block_ids.shape[1])
    return usual if layout.document_ids is None else max(usual, int(layout.block_ids.max()) + 1)


def _with_complements(
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    level: NoiseLevel,
    block_ids: torch.Tensor,
    maskable: torch.Tensor,
    low: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add to each noisy stream the one that masks what it shows, so that a pair scores every token.

    The partner's tokens are masked with probability p' = 1 - p. The bound is an integral over dp / p, whatever the
    schedule, so the partner has the weight (dp / dt) / (1 - p), held finite where p approaches 1.
    """
    masked, weights, move_chance = found
    shown = (1 - move_chance).clamp(min=SAMPLING_EPS)
    partner = torch.ones_like(shown) if low > 0.5 else level.move_rate / shown
    return (
        torch.cat([masked, maskable & ~masked], dim=1),
        torch.cat([weights, per_token(partner, block_ids)], dim=1),
        torch.cat([move_chance, 1 - move_chance], dim=1),
    )


def evaluation_interval(config: PreTrainedConfig) -> tuple[float, float]:
    """Return the noise levels over which the bound is taken: all of them."""
    # At block size 1 a full mask is the whole bound: the exact autoregressive likelihood.
    return (1.0, 1.0) if config.block_size == 1 else (SAMPLING_EPS, 1.0)


def sigma_of(config: PreTrainedConfig, move_chance: torch.Tensor | None) -> torch.Tensor | None:
    """The noise level of a sequence, as published that of its first block."""
    if not config.time_conditioning or move_chance is None:
        return None
    return LogLinearNoise().sigma(move_chance[:, 0])


def check_text(model: DenoisingNetwork, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
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


_LOGIT_BUDGET = 2**23  # logits alive at a time, 32 MiB in float32


def cross_entropy(
    hidden: torch.Tensor, head: LogitsHead, targets: torch.Tensor, config: PreTrainedConfig
) -> torch.Tensor:
    """Return -log p(target) of each row in float32, the mask token having probability zero; `(rows,)`.

    Runs in chunks of logits, for evaluation; see [`chunked_cross_entropy`] for training.
    """
    step = _rows_per_chunk(config)
    losses = [
        _chunk_losses(hidden[i : i + step], head, targets[i : i + step], config.mask_token_id)
        for i in range(0, hidden.shape[0], step)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


def chunked_cross_entropy(
    hidden: torch.Tensor, head: LogitsHead, targets: torch.Tensor, weights: torch.Tensor, config: PreTrainedConfig
) -> torch.Tensor:
    """Return sum_i weights_i * -log p(target_i), differentiable, never holding more than a chunk of logits.

    Args:
        hidden: `(rows, hidden_dim)`.
        head: makes logits of hidden states. A plain `nn.Linear` gets its gradient while its logits are alive; any
            other callable, such as a head wrapped by PEFT or one that scales or caps its logits, is recomputed chunk
            by chunk in the backward pass.
        targets, weights: `(rows,)`; the weights are constants.
        config: read for `vocab_size` and `mask_token_id`.
    """
    step, mask = _rows_per_chunk(config), config.mask_token_id
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:

        def fused(rows: torch.Tensor) -> torch.Tensor:
            return _FusedHeadLoss.apply(rows, head.weight, head.bias, targets, weights, mask, step)

        if is_plain_linear(head):
            return fused(hidden)
        if is_sharded(head):
            # One call for all chunks: processes with more masked tokens than others would gather the weights more
            # often than these, and wait for ever.
            return call_as(head, fused, hidden)
    total = hidden.sum() * 0.0
    for i in range(0, hidden.shape[0], step):
        arguments = (hidden[i : i + step], head, targets[i : i + step], mask)
        total = total + (checkpoint(_chunk_losses, *arguments, use_reentrant=False) * weights[i : i + step]).sum()
    return total


def _rows_per_chunk(config: PreTrainedConfig) -> int:
    return max(1, _LOGIT_BUDGET // int(config.vocab_size))


def _chunk_losses(hidden: torch.Tensor, head: LogitsHead, targets: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    logits = head(hidden).float()
    logits = logits.index_fill(1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    return F.cross_entropy(logits, targets, reduction="none")


class _FusedHeadLoss(torch.autograd.Function):
    """Weighted cross-entropy of a linear head whose gradients are taken chunk by chunk in the forward pass.

    The loss is a scalar and the weights are constants, so the gradient with respect to the logits is known as soon as
    they are: weight * (softmax - onehot). Taking it there costs no recomputation and no memory beyond one chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        mask_token_id: int,
        step: int,
    ) -> torch.Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias and bias is not None else None
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        for i in range(0, hidden.shape[0], step):
            rows, target = hidden[i : i + step], targets[i : i + step, None]
            coefficient = weights[i : i + step, None].float()
            logits = F.linear(rows, weight, bias).float()
            logits[:, mask_token_id] = -torch.inf
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            total += ((log_sum - logits.gather(1, target)) * coefficient).sum()
            if not any(ctx.needs_input_grad[:3]):
                continue
            grad = logits.sub_(log_sum).exp_()
            grad.scatter_add_(1, target, -torch.ones_like(coefficient))
            grad *= coefficient
            if grad_bias is not None:
                grad_bias += grad.sum(0).to(grad_bias.dtype)
            grad = grad.to(rows.dtype)
            if grad_hidden is not None:
                grad_hidden[i : i + step] = grad @ weight.to(grad.dtype)
            if grad_weight is not None:
                if grad.dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad.T, rows)
                else:
                    grad_weight += (grad.T @ rows).to(grad_weight.dtype)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of the head's loss can be taken once; run the forward pass again.")
        # In place, since the head's gradient is as large as the head.
        grads = [None if g is None else g.mul_(grad_output.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None
        return (*grads, None, None, None, None)


__all__ = [
    "DenoisingNetwork",
    "LogitsHead",
    "LossMask",
    "check_text",
    "chunked_cross_entropy",
    "corrupt",
    "cross_entropy",
    "denoising_loss",
    "evaluation_interval",
    "loss_mask",
    "sigma_of",
]
