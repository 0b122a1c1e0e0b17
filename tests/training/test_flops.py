import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.loss_bd3lm import mean_move_chance
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.training.callbacks import attended_pairs, forward_flops, peak_tflops_of, training_flops


class FlopCounter(TorchDispatchMode):
    """torch's `FlopCounterMode` without its hooks on modules, which a backward pass inside a backward pass upsets."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.attention = 0  # only attention uses batched products

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket
        if name in flop_registry:
            flops = flop_registry[name](*args, **(kwargs or {}), out_val=result)
            if name in (torch.ops.aten.mm, torch.ops.aten.addmm):
                self.weights += flops
            else:
                self.attention += flops
        return result


@pytest.fixture
def config() -> BD3LMConfig:
    """Wide enough for its matrices to outweigh what the count leaves out."""
    sizes = {"vocab_size": 512, "block_size": 8, "model_length": 64, "hidden_dim": 128, "cond_dim": 16}
    return BD3LMConfig(**sizes, n_blocks=3, n_heads=4, dropout=0.0, attn_implementation="eager")


@pytest.mark.parametrize(("length", "block_size"), [(32, 4), (30, 4), (8, 8), (5, 1), (3, 8)])
def test_attended_pairs_are_those_of_the_mask(length, block_size):
    blocks = torch.arange(length) // block_size
    assert attended_pairs(length, block_size) == (blocks[:, None] >= blocks[None, :]).sum().item()


@pytest.mark.parametrize(
    ("noise", "low", "high", "rate"), [("loglinear", 0.001, 1.0, 0.5005), ("square", 0, 1, 1 / 3)]
)
def test_the_mean_move_chance_is_the_mean_of_the_schedule(noise, low, high, rate):
    assert mean_move_chance(noise, low, high) == pytest.approx(rate, abs=1e-3)


def test_frozen_weights_need_no_gradient(config):
    whole = training_flops(BD3LMForMaskedLM(config), 1, 64)
    adapted = get_peft_model(BD3LMForMaskedLM(config), LoraConfig(r=2, target_modules=["attn_qkv"]))
    assert training_flops(adapted, 1, 64) == pytest.approx(whole * 2 / 3, rel=0.05)


def test_models_without_a_count_of_their_own_have_none(config):
    class OtherConfig(BD3LMConfig):
        pass

    assert training_flops(BD3LMForMaskedLM(OtherConfig(**config.to_dict())), 1, 64) is None


PEAKS = {"NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.0}
PEAKS |= {"NVIDIA H200": 989.4, "NVIDIA RTX A5000": 111.1, "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA L4": 121.0}
PEAKS |= {"NVIDIA L40S": 362.0, "": 0.0, "Some other device": 0.0}


@pytest.mark.parametrize(("name", "peak"), PEAKS.items())
def test_the_peak_is_known_by_the_name_of_the_device(name, peak):
    assert peak_tflops_of(name) == peak


@pytest.mark.parametrize(("draws", "interval"), [(1, (1e-3, 1)), (2, (1e-3, 1)), (3, (1e-3, 1)), (1, (0.1, 0.3))])
def test_the_expected_count_is_what_torch_counts(config, draws, interval):
    config.noise_draws = draws
    model = BD3LMForMaskedLM(config).train()
    model.set_interval(*interval)
    ids = torch.randint(1, 500, (24, 64), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with FlopCounter() as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    expected, attention = forward_flops(config, 64, 64 * sum(interval) / 2, num_noise_samples=draws)
    assert counter.weights == pytest.approx(24 * 3 * expected, rel=0.03)
    # Eager attention multiplies every pair; the masks allow this share of them.
    clean = 64 * (1 + draws) * 64
    noisy = draws * clean
    dense = (2 * (clean + noisy) + noisy) / ((2 * (1 + draws) + draws) * attended_pairs(64, 8))
    assert counter.attention == pytest.approx(24 * 3 * attention * dense, rel=0.02)
    assert training_flops(model, 24, 64) == pytest.approx(24 * 3 * (expected + attention), rel=1e-3)
