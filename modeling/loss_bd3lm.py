"""The training loss: the negative evidence lower bound of block diffusion (arXiv 2503.09573, Eq. 8 and Algorithm 1).

In training the noise is not drawn here. The collator draws it for each example, from the seed and the example's index
(`training/examples.py`), and the batch carries it as `block_noise`, `token_noise` and `count_noise`. So it depends on
neither the layout of batches and processes nor a resume. Only a batch without noise gets it here, from torch's global
generator.

For a block x_0^b given the clean blocks before it,

    -log p(x_0^b | x_0^<b)  <=  E_t E_{x_t}  w(t) * sum over masked positions of -log p(x_0 | x_t^b, x_0^<b),

with w(t) = -alpha'_t / (1 - alpha_t), which is 1/t for the log-linear schedule. SUBS parameterisation: the mask token
has probability zero, and unmasked tokens are carried over, so they add nothing. The head therefore computes logits of
masked positions only, in chunks, and a `(batch, length, vocab_size)` tensor never exists.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.configuration_utils import PreTrainedConfig

from .configuration_bd3lm import SAMPLING_EPS
from .inputs_bd3lm import Layout, check_text, may_read, token_layout
from .layers_bd3lm import call_as, is_plain_linear, is_sharded
from .noise_bd3lm import (
    LogLinearNoise,
    Noise,
    NoiseLevel,
    check_noise_samples,
    clips,
    draw_noise,
    mask_exact_numbers,
    mask_positions,
    mask_positions_within,
    noise_schedule,
    per_token,
    times,
)


#: Maps normed hidden states `(rows, hidden_dim)` to logits `(rows, vocab_size)`.
LogitsHead = Callable[[torch.Tensor], torch.Tensor]


class LossMask(NamedTuple):
    """Which tokens of a batch take part in the loss; all bool `(batch, length)`."""

    counted: torch.Tensor  # in the denominator of the mean
    maskable: torch.Tensor  # can be masked
    valid: torch.Tensor  # not padding


def denoising_loss(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    noise: Noise | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    interval: tuple[float, float] = (SAMPLING_EPS, 1.0),
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the objective of Algorithm 1 in nats per token: a scalar with a gradient, the mean over noise samples.

    The model has a `config`, `training`, `logits_head()`, and `noisy_hidden` as in [`BD3LMLanguageModel`].

    1. Count the tokens whose labels are not -100. Under `config.ignore_bos` the first token of a sequence is never
       masked; as published, it still counts in the mean of training, but not in that of evaluation.
    2. Draw a time t for each block, from the model's interval in train mode or [1e-3, 1] in eval mode, and the masked
       positions of each noise sample: those of `noise`, or `config.noise_draws` in train mode and one in eval mode.
    3. Run the x_t of all noise samples with one shared clean stream; keep the hidden states of masked positions only.
    4. Divide the weighted cross-entropy by the number of counted tokens or by `num_items_in_batch`.

    With an interval [beta, omega] other than [1e-3, 1] the value is not a bound: it covers only part of the noise
    levels, and its weight is that of the published code, not of the paper. In the paper a clipped schedule has mask
    rates beta + (omega - beta) t for t over [0, 1], so alpha' is a constant of the interval (Sec. 5.2 states it as
    1/(beta - omega)) and scales all weights alike. The published code leaves this constant out: the weight stays w(t),
    and is 1 throughout when the interval starts above 0.5. One constant for all tokens moves no minimum, and Adam
    divides it out again, but it changes the size of the loss and of the gradient norm that `max_grad_norm` clips.
    """
    config = model.config
    check_text(config, input_ids, labels, attention_mask)
    # 1. Which tokens count
    length, device = input_ids.shape[1], input_ids.device
    layout = token_layout(attention_mask, length, config.block_size, device=device, position_ids=position_ids)
    scored = loss_mask(layout, labels, ignore_bos=config.ignore_bos, training=model.training)
    # 2. Noise
    low, high = interval if model.training else evaluation_interval(config)
    masked, weights, move_chance = corrupt(model, layout, scored, noise, low, high)
    num_noise_samples = masked.shape[1] // length
    check_noise_samples(num_noise_samples, config.time_conditioning)
    # 3. Hidden states of the masked positions
    # Packed documents can have many blocks of one token, which `exact_k` always masks.
    packed = layout.document_ids is not None and config.masking == "exact_k"
    bound = 1.0 if packed else move_chance_bound(config, low, high, model.training)
    indices, is_masked = masked_indices(masked, bound, config)
    x_t = torch.where(masked, config.mask_token_id, input_ids.repeat(1, num_noise_samples))
    sigma = sigma_of(config, move_chance)
    hidden = model.noisy_hidden(x_t, input_ids, layout, indices, sigma, num_noise_samples=num_noise_samples)
    # 4. Weighted cross-entropy
    targets = labels.repeat(1, num_noise_samples).flatten()[indices]
    coefficients = weights.flatten()[indices] / num_noise_samples
    if is_masked is not None:
        targets = targets.clamp(min=0)
        coefficients = torch.where(is_masked == 0, 0.0, coefficients * is_masked)  # keeps out a weight of 1/0
    total = chunked_cross_entropy(hidden, model.logits_head(), targets, coefficients, config)
    return divide_by_count(total, scored.counted, num_items_in_batch)


def divide_by_count(
    total: torch.Tensor, counted: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Divide a summed loss by the number of `counted` tokens, or by `num_items_in_batch` if given."""
    count = counted.sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


def masked_indices(
    masked: torch.Tensor, bound: float, config: PreTrainedConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return flat indices of the masked positions, and a float mask of the indices in use (None: all).

    `nonzero` waits for the device, since the size of its result depends on the data. Where that is not allowed, the
    number of indices follows from the shape alone: the expected number of masked positions plus a margin that
    independent blocks exceed with a probability below 1e-12 (Hoeffding). If hand-made noise exceeds it, the loss is
    nan.

    Args:
        masked: bool `(batch, length)`.
        bound: upper bound on the mean masking probability of the batch.
    """
    if may_read(masked.device):
        return masked.flatten().nonzero().squeeze(1), None
    total = masked.numel()
    margin = math.sqrt(0.5 * math.log(1e12) * total * config.block_size)
    capacity = min(total, math.ceil(bound * total + margin))
    flat = masked.flatten()
    slot = flat.long().cumsum(0) - 1
    # Unmasked positions, and masked ones beyond the capacity, go to a spare slot at the end.
    slot = torch.where(flat & (slot < capacity), slot, capacity)
    indices = torch.zeros(capacity + 1, dtype=torch.long, device=flat.device)
    indices = indices.scatter_(0, slot, torch.arange(total, device=flat.device))[:capacity]
    count = flat.sum()
    is_masked = (torch.arange(capacity, device=flat.device) < count).float()
    return indices, torch.where(count > capacity, torch.nan, is_masked)


def move_chance_bound(config: PreTrainedConfig, low: float, high: float, training: bool) -> float:
    """Return the mean masking probability over times in [low, high]; an upper bound where rates are truncated."""
    if config.complementary and training:
        return 0.5  # a pair of streams masks each token once
    if config.masking == "exact_k":
        return min(1.0, ((low + high) / 2 if clips(low, high) else 0.5) + 1 / config.block_size)
    return high if config.resample and clips(low, high) else mean_move_chance(config.noise, low, high)


@torch.compiler.assume_constant_result  # decides shapes, so tracing must not turn it into a tensor
def mean_move_chance(noise: str, low: float, high: float) -> float:
    """Return the mean masking probability of a schedule over times t uniform on [low, high]."""
    return _mean_move_chance(noise, low, high)


@functools.lru_cache(maxsize=64)
def _mean_move_chance(noise: str, low: float, high: float) -> float:
    return noise_schedule(noise)(torch.linspace(low, high, 1001, dtype=torch.float64)).move_chance.mean().item()


def loss_mask(layout: Layout, labels: torch.Tensor, *, ignore_bos: bool, training: bool) -> LossMask:
    """Return which tokens count and which can be masked, given labels `(batch, length)` and padding."""
    valid = torch.ones_like(labels, dtype=torch.bool) if layout.valid is None else layout.valid
    counted = (labels != -100) & valid
    if not ignore_bos:
        return LossMask(counted, counted, valid)
    later = counted & (layout.position_ids > 0)
    return LossMask(counted if training else later, later, valid)


class Corruption(NamedTuple):
    """The noisy streams of a batch, side by side in each row."""

    masked: torch.Tensor  # bool (batch, num_noise_samples * length)
    weights: torch.Tensor  # (batch, num_noise_samples * length), weight of each position's loss
    move_chance: Any  # (batch, num_noise_samples * num_blocks), masking probability; None where it is not read


def corrupt(
    model: Any,
    layout: Layout,
    scored: LossMask,
    noise: Noise | None,
    low: float,
    high: float,
    *,
    training: bool | None = None,
) -> Corruption:
    """Mask a batch at times in [low, high], with the given noise or, if None, new noise.

    Args:
        training: whether `config.resample` truncates the mask rates, as it does in training; by default the model's
            mode.
    """
    config, training = model.config, model.training if training is None else training
    batch, length = scored.counted.shape
    device = scored.counted.device
    if noise is None:
        blocks, count = _num_blocks(layout, config), config.noise_draws if model.training else 1
        order = config.antithetic_sampling
        noise = draw_noise(batch, blocks, length, num_noise_samples=count, order=order, device=device)
    # The noise samples of a sequence are one long row of num_noise_samples * blocks blocks.
    num_noise_samples = noise.num_noise_samples()
    noise = Noise(*(x.to(device, non_blocking=True) for x in noise.side_by_side()))
    blocks = noise.block_noise.shape[1] // num_noise_samples
    block_ids = torch.cat([layout.block_ids + sample * blocks for sample in range(num_noise_samples)], dim=1)
    maskable = scored.maskable.repeat(1, num_noise_samples)
    if config.masking == "exact_k":
        return Corruption(*mask_exact_numbers(noise, block_ids, maskable, low, high), None)
    level = noise_schedule(config.noise)(times(noise.block_noise, low, high))
    if config.resample and training and clips(low, high):
        valid, size = scored.valid.repeat(1, num_noise_samples), config.block_size
        masked = mask_positions_within(noise, level.move_chance, block_ids, valid, low, high, block_size=size)
    else:
        masked = mask_positions(noise, level.move_chance, block_ids)
    weights = torch.ones_like(level.move_chance) if low > 0.5 else -level.loss_scaling
    found = Corruption(masked & maskable, per_token(weights, block_ids), level.move_chance)
    if config.complementary and model.training:
        return _with_complements(found, level, block_ids, maskable, low)
    return found


def _num_blocks(layout: Layout, config: PreTrainedConfig) -> int:
    """Return the number of blocks in a row, which is larger for packed documents, as each can end in a short block.

    Counting those would wait for an accelerator, so there a packed row gets noise for as many blocks as tokens.
    """
    length = layout.block_ids.shape[1]
    usual = config.num_blocks(length)
    if layout.document_ids is None:
        return usual
    return max(usual, int(layout.block_ids.max()) + 1) if may_read(layout.block_ids.device) else length


def _with_complements(
    found: Corruption, level: NoiseLevel, block_ids: torch.Tensor, maskable: torch.Tensor, low: float
) -> Corruption:
    """Add to each noisy stream its complement, which masks exactly the other tokens: a pair scores every token.

    The complement masks a token with probability p' = 1 - p. The bound is an integral over dp / p, whatever the
    schedule, so the complement has the weight (dp / dt) / (1 - p), kept finite where p approaches 1.
    """
    masked, weights, move_chance = found
    shown = (1 - move_chance).clamp(min=SAMPLING_EPS)
    complement = torch.ones_like(shown) if low > 0.5 else level.move_rate / shown
    return Corruption(
        torch.cat([masked, maskable & ~masked], dim=1),
        torch.cat([weights, per_token(complement, block_ids)], dim=1),
        torch.cat([move_chance, 1 - move_chance], dim=1),
    )


def evaluation_interval(config: PreTrainedConfig) -> tuple[float, float]:
    """Return the interval of times over which the bound is taken: the full one."""
    # At block size 1 the full mask alone gives the exact autoregressive likelihood.
    return (1.0, 1.0) if config.block_size == 1 else (SAMPLING_EPS, 1.0)


def sigma_of(config: PreTrainedConfig, move_chance: torch.Tensor | None) -> torch.Tensor | None:
    """Return the noise level `(batch,)` of each sequence, as published that of its first block; None if not read."""
    if not config.time_conditioning or move_chance is None:
        return None
    return LogLinearNoise().sigma(move_chance[:, 0])


# Logits alive at a time: 32 MiB in float32, near a CPU's cache; on accelerators 512 MiB, for large products and few
# sums of head-sized gradients.
_LOGIT_BUDGET = 2**23
_ACCELERATOR_LOGIT_BUDGET = 2**27


def cross_entropy(
    hidden: torch.Tensor, head: LogitsHead, targets: torch.Tensor, config: PreTrainedConfig
) -> torch.Tensor:
    """Return -log p(target) `(rows,)` in float32, with probability zero for the mask token.

    Runs in chunks of logits, for evaluation; see [`chunked_cross_entropy`] for training.
    """
    step = _rows_per_chunk(config, hidden.device)
    losses = [
        _chunk_losses(hidden[i : i + step], head, targets[i : i + step], config.mask_token_id)
        for i in range(0, hidden.shape[0], step)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


def chunked_cross_entropy(
    hidden: torch.Tensor, head: LogitsHead, targets: torch.Tensor, weights: torch.Tensor, config: PreTrainedConfig
) -> torch.Tensor:
    """Return sum_i weights_i * -log p(target_i), differentiable, with only one chunk of logits in memory at a time.

    Args:
        hidden: `(rows, hidden_dim)`.
        head: maps hidden states to logits. A plain `nn.Linear` gets its gradient while its logits are alive; any other
            callable, such as a head wrapped by PEFT or one that scales or caps its logits, is recomputed chunk by
            chunk in the backward pass.
        targets, weights: `(rows,)`; the weights are constants.
        config: read for `vocab_size` and `mask_token_id`.
    """
    step, mask = _rows_per_chunk(config, hidden.device), config.mask_token_id
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:

        def fused(rows: torch.Tensor) -> torch.Tensor:
            return _FusedHeadLoss.apply(rows, head.weight, head.bias, targets, weights, mask, step)

        if is_plain_linear(head):
            return fused(hidden)
        if is_sharded(head):
            # One call for all chunks: a process with more masked tokens than another would gather the weights more
            # often, and wait forever.
            return call_as(head, fused, hidden)
    total = hidden.sum() * 0.0
    for i in range(0, hidden.shape[0], step):
        arguments = (hidden[i : i + step], head, targets[i : i + step], mask)
        total = total + (checkpoint(_chunk_losses, *arguments, use_reentrant=False) * weights[i : i + step]).sum()
    return total


def _rows_per_chunk(config: PreTrainedConfig, device: torch.device) -> int:
    budget = _LOGIT_BUDGET if device.type == "cpu" else _ACCELERATOR_LOGIT_BUDGET
    return max(1, budget // int(config.vocab_size))


def _chunk_losses(hidden: torch.Tensor, head: LogitsHead, targets: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    logits = head(hidden).float()
    is_mask = torch.arange(logits.shape[1], device=logits.device) == mask_token_id  # no copy from the host
    logits = logits.masked_fill(is_mask, -torch.inf)
    return F.cross_entropy(logits, targets.long(), reduction="none")


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return autocast's precision if it is on, else that of `hidden`."""
    device = hidden.device.type
    # torch 2.11 cannot trace `is_autocast_available`; devices that code is compiled for have autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return torch.get_autocast_dtype(device) if available and torch.is_autocast_enabled(device) else hidden.dtype


# Eager code takes the fewest passes over the logits by writing to them in place. Compiled code would take the most: it
# fuses out-of-place expressions into one pass over the logits in the product's precision, without a float32 copy.


def _without_mask(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    if torch.compiler.is_compiling():
        token = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(token == mask_token_id, -torch.inf)
    logits[:, mask_token_id] = -torch.inf
    return logits


def _logit_gradient(
    logits: torch.Tensor, log_sum: torch.Tensor, target: torch.Tensor, coefficient: torch.Tensor
) -> torch.Tensor:
    """Return coefficient * (softmax - onehot), which may overwrite the logits."""
    if torch.compiler.is_compiling():
        token = torch.arange(logits.shape[1], device=logits.device)
        return ((logits - log_sum).exp() - (token == target).float()) * coefficient
    grad = logits.sub_(log_sum).exp_()
    grad.scatter_add_(1, target, -torch.ones_like(coefficient))
    return grad.mul_(coefficient)


class _FusedHeadLoss(torch.autograd.Function):
    """Weighted cross-entropy of a linear head whose gradients are computed chunk by chunk in the forward pass.

    The loss is a scalar and the weights are constants, so the gradient with respect to the logits is known as soon as
    they are: weight * (softmax - onehot). Computing it there needs no recomputation and no memory beyond one chunk.
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
        # Under autocast all three products run in its precision, even the in-place one, which autocast does not cast.
        dtype = _product_dtype(hidden)
        head = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None  # summed in the precision of the weight
        grad_bias = torch.zeros_like(bias) if need_bias and bias is not None else None
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        for i in range(0, hidden.shape[0], step):
            rows, target = hidden[i : i + step].to(dtype), targets[i : i + step, None]
            if i and torch.compiler.is_compiling():
                # Wait for the chunk before: otherwise one kernel would compute several, all in memory at a time.
                rows = rows + torch.where(total.isnan(), total, 0.0).to(dtype)
            coefficient = weights[i : i + step, None].float()
            logits = F.linear(rows, head, None if bias is None else bias.to(dtype)).float()
            logits = _without_mask(logits, mask_token_id)
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            # Not in place: compiled by torch 2.11, a result updated in place would get no gradient.
            total = total + ((log_sum - logits.gather(1, target)) * coefficient).sum()
            if not any(ctx.needs_input_grad[:3]):
                continue
            grad = _logit_gradient(logits, log_sum, target, coefficient).to(dtype)
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=grad_bias.dtype)
            if grad_hidden is not None:
                grad_hidden[i : i + step] = grad @ head
            if grad_weight is not None:
                if grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad.T, rows)
                else:
                    grad_weight += grad.T @ rows
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the head's loss supports a single backward pass: run the forward pass again.")
        # In place, since the head's gradient is as large as the head.
        grads = [None if g is None else g.mul_(grad_output.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None
        return (*grads, None, None, None, None)
