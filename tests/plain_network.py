"""The published network in plain torch under a dense mask, to compare every fast way through ours with."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def plain_logits(
    model: torch.nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Return logits `(batch, length, vocab_size)` of `input_ids` at noise level 0, from weights and sizes alone.

    Args:
        position_ids: `(length,)`.
        allowed: bool `(length, length)`, which keys (columns) a query (row) sees.
    """
    weights, config = {k.removeprefix("backbone."): v for k, v in model.state_dict().items()}, model.config
    heads, dim = config.n_heads, config.hidden_dim // config.n_heads
    angle = torch.outer(position_ids, 10000.0 ** (-torch.arange(0, dim, 2).float() / dim))
    cos, sin = (torch.cat([f(angle)] * 2, dim=-1) for f in (torch.cos, torch.sin))

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * weights[f"{name}.weight"] * (1 + scale) + shift

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    features = torch.cat([torch.ones(1, 128), torch.zeros(1, 128)], dim=1)  # of sigma = 0
    condition = F.silu(linear("sigma_map.mlp.2", F.silu(linear("sigma_map.mlp.0", features))))
    x = weights["vocab_embed.embedding"][input_ids]
    for i in range(config.n_blocks):
        shift, scale, gate, shift_2, scale_2, gate_2 = linear(f"blocks.{i}.adaLN_modulation", condition).chunk(6, -1)
        qkv = linear(f"blocks.{i}.attn_qkv", norm(f"blocks.{i}.norm1", x, shift, scale))
        query, key, value = (y.unflatten(-1, (heads, dim)).transpose(1, 2) for y in qkv.chunk(3, -1))
        scores = rotated(query) @ rotated(key).transpose(2, 3) / dim**0.5
        attended = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
        x = x + gate * linear(f"blocks.{i}.attn_out", attended.transpose(1, 2).flatten(2))
        widened = linear(f"blocks.{i}.mlp.0", norm(f"blocks.{i}.norm2", x, shift_2, scale_2))
        x = x + gate_2 * linear(f"blocks.{i}.mlp.2", F.gelu(widened, approximate="tanh"))
    shift, scale = linear("output_layer.adaLN_modulation", condition).chunk(2, -1)
    return linear("output_layer.linear", norm("output_layer.norm_final", x, shift, scale))
