"""Floating-point operations of training, and the share of a device's peak that they make up (MFU).

A multiplication and an addition count as two operations. Counted is what the mathematics needs: nothing that gradient
checkpointing repeats, and of attention only the pairs that the block-causal masks allow.
"""

import functools
from typing import Any

import torch

from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.schedules_bd3lm import noise_schedule


# Dense bfloat16 TFLOP/s with float32 accumulation, from the makers' data sheets. The first entry counts whose words
# are all in the name of the device.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 149.7,
    "A10": 125.0,
    "RTX A6000": 154.8,
    "RTX A5000": 111.1,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def forward_flops(config: BD3LMConfig, length: int, masked: float, *, draws: int = 1) -> tuple[float, float]:
    """Operations of the training forward pass over one sequence: those of weights, and those of attention.

    The clean stream leaves out its last layer's queries, MLP and head; of the noisy stream only masked positions pass
    the last layer's output projection and MLP, and the head. Embeddings, norms and adaLN are not counted.

    Args:
        length: tokens of the sequence.
        masked: masked tokens of a noisy stream, or their expectation.
        draws: noisy streams beside the one clean stream.
    """
    width, layers = config.hidden_dim, config.n_blocks
    both, noisy, rows = (1 + draws) * length, draws * length, draws * masked
    weights: float = (layers - 1) * both * 12 * width**2
    weights += (2 * both + noisy + 9 * rows) * width**2 + rows * width * config.vocab_size
    pairs = attended_pairs(length, config.block_size)
    attention = ((layers - 1) * (1 + draws) + draws) * pairs * 2 * width
    return 2.0 * weights, 2.0 * attention


def attended_pairs(length: int, block_size: int) -> int:
    """Query-key pairs of one stream: a token sees earlier blocks and its own, in the clean and the noisy stream."""
    blocks, rest = divmod(length, block_size)
    return block_size**2 * blocks * (blocks + 1) // 2 + rest * length


def training_flops(model: Any, batch: int, length: int) -> int | None:
    """Operations of forward and backward over `batch` sequences; None for models whose count is not known here.

    A backward pass takes the forward's operations once for the gradient of the inputs and once for that of the
    weights, of which frozen weights need none. The masked tokens are counted in expectation, over the model's current
    interval of noise levels.
    """
    config = getattr(model, "config", None)
    if type(config) is not BD3LMConfig:  # which wrappers of the model pass on, and other architectures extend
        return None
    masked = expected_mask_rate(config.noise, *model.interval()) * length
    weights, attention = forward_flops(config, length, masked, draws=getattr(config, "noise_draws", 1))
    return round(batch * ((2 + _trained_share(model)) * weights + 3 * attention))


@functools.lru_cache(maxsize=64)
def expected_mask_rate(noise: str, low: float, high: float) -> float:
    """Mean masking probability over times t uniform on [low, high]."""
    times = torch.linspace(low, high, 1001, dtype=torch.float64)
    return noise_schedule(noise)(times).move_chance.mean().item()


def peak_flops(args: Any) -> float:
    """Peak operations per second of one device, from `args.peak_tflops` or a table; 0 when it is not known."""
    if args.peak_tflops is not None:
        return args.peak_tflops * 1e12
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else ""
    return peak_tflops_of(name) * 1e12


def peak_tflops_of(device_name: str) -> float:
    """Peak bfloat16 TFLOP/s of a GPU by its name, such as `NVIDIA A100-SXM4-80GB`; 0 when it is not known."""
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in _PEAK_TFLOPS.items() if set(name.split()) <= set(words)), 0.0)


def _trained_share(model: Any) -> float:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained) / max(1, sum(size for size, _ in sizes))


__all__ = [
    "attended_pairs",
    "expected_mask_rate",
    "forward_flops",
    "peak_flops",
    "peak_tflops_of",
    "training_flops",
]
