"""The cross-entropy of the output head on the rows that need it, without a (batch, length, vocabulary) tensor.

Only masked positions carry a loss (SUBS: unmasked tokens are carried over), and their logits live in chunks. The mask
token has probability zero.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .sharding_bd3lm import call_as, is_sharded


_LOGIT_BUDGET = 2**23  # logits alive at a time, 32 MiB in float32


def cross_entropy(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """-log p(target) of each row in float32, the mask token having probability zero; `(rows,)`.

    Runs in chunks and without a gradient for the head's logits to live on; see [`weighted_cross_entropy`] for
    training.
    """
    step = _chunk(head)
    losses = [
        _chunk_losses(hidden[i : i + step], head, targets[i : i + step], mask_token_id)
        for i in range(0, hidden.shape[0], step)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


def weighted_cross_entropy(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, weights: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """sum_i weights_i * -log p(target_i), differentiable, never holding more than a chunk of logits.

    Args:
        hidden: `(rows, hidden_dim)`.
        head: the output layer. A plain `nn.Linear` gets its gradient while its logits are alive; anything else, such
            as a head wrapped by PEFT, is recomputed chunk by chunk in the backward pass.
        targets, weights: `(rows,)`; the weights are constants.
    """

    def fused(rows: torch.Tensor) -> torch.Tensor:
        return _FusedHeadLoss.apply(rows, head.weight, head.bias, targets, weights, mask_token_id, _chunk(head))

    if is_plain_linear(head):
        return fused(hidden)
    if is_sharded(head) and type(head).forward is nn.Linear.forward:
        # One call for all chunks: processes with more masked tokens than others would gather the weights more often
        # than these, and wait for ever.
        return call_as(head, fused, hidden)
    step, total = _chunk(head), hidden.sum() * 0.0
    for i in range(0, hidden.shape[0], step):
        arguments = (hidden[i : i + step], head, targets[i : i + step], mask_token_id)
        total = total + (checkpoint(_chunk_losses, *arguments, use_reentrant=False) * weights[i : i + step]).sum()
    return total


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b and nothing else: not one that PEFT or a hook has extended."""
    extended = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module)
    )
    return type(module).forward is nn.Linear.forward and not extended


def _chunk(head: nn.Module) -> int:
    return max(1, _LOGIT_BUDGET // cast(int, head.out_features))


def _chunk_losses(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, mask_token_id: int) -> torch.Tensor:
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


__all__ = ["cross_entropy", "is_plain_linear", "weighted_cross_entropy"]
