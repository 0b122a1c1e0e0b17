"""Weights in 8 and 4 bits, with the common libraries: as close to the full model as those of a stock Llama.

They are optional, and not among the pins: `make test-slow` installs them where it can.
"""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from decoders import random_ids, tiny_decoder, tiny_stock
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from shared_models import tiny_bd3lm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SIZES = {"hidden_size": 128, "intermediate_size": 256}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
BITS = {"8 bit": {"load_in_8bit": True}, "nf4": NF4, "nf4 twice": {**NF4, "bnb_4bit_use_double_quant": True}}


@pytest.fixture
def models():
    """The network of the paper, an adapted Llama, and the stock Llama to compare with."""
    ours = tiny_bd3lm(hidden_dim=128, cond_dim=64)
    return {"bd3lm": ours, "llama": tiny_decoder("llama", **SIZES), "stock": tiny_stock("llama", **SIZES)}


@torch.no_grad()
def relative_error(model: Any, plain: Any) -> float:
    ids = random_ids().clamp(max=40)
    expected = plain(ids).logits
    return float((model(ids).logits.float() - expected).norm() / expected.norm())


def check_use(model: Any) -> None:
    """Check that a model with other weights scores and generates."""
    ids = random_ids(1).clamp(max=40)
    assert model.generate(ids, max_new_tokens=4).shape[1] <= ids.shape[1] + 4
    if hasattr(model, "token_nll"):
        assert torch.isfinite(model.token_nll(ids, estimator="exact").nll).all()


@pytest.mark.parametrize("bits", BITS)
def test_bitsandbytes(models, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    errors = {}
    for name, plain in models.items():
        plain.save_pretrained(tmp_path / name)
        config = BitsAndBytesConfig(**BITS[bits])
        options = {"quantization_config": config, "device_map": "cpu", "dtype": torch.float32}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, **options)
        errors[name] = relative_error(loaded, plain)
        check_use(loaded)
    assert max(errors["bd3lm"], errors["llama"]) < 2 * errors["stock"] + 0.05, errors


@pytest.mark.parametrize("name", ["bd3lm", "llama"])
def test_qlora(models, tmp_path, name):
    pytest.importorskip("bitsandbytes")
    models[name].save_pretrained(tmp_path)
    options = {"quantization_config": BitsAndBytesConfig(**NF4), "device_map": "cpu", "dtype": torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    adapted = get_peft_model(prepare_model_for_kbit_training(loaded), LoraConfig(task_type="CAUSAL_LM", r=2)).train()
    ids = random_ids().clamp(max=40)
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("name", ["bd3lm", "llama", "stock"])
def test_torchao(models, name, config):
    quantization = pytest.importorskip("torchao.quantization")
    plain = models[name]
    model = copy.deepcopy(plain)
    quantization.quantize_(model, getattr(quantization, config)())
    assert relative_error(model, plain) < 0.1
    check_use(model)


@pytest.mark.parametrize("name", ["bd3lm", "llama"])
def test_weights_of_torchao_are_saved(models, tmp_path, name):
    quantization = pytest.importorskip("torchao.quantization")
    models[name].save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    load = partial(AutoModelForCausalLM.from_pretrained, device_map="cpu")
    quantized = load(tmp_path / "plain", quantization_config=config)
    quantized.save_pretrained(tmp_path / "int8")
    loaded = load(tmp_path / "int8")
    assert relative_error(loaded, quantized) < 1e-3 and loaded.interval() == quantized.interval()


@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
@pytest.mark.parametrize("name", ["bd3lm", "llama"])
def test_trainers_of_trl_are_refused(models, tmp_path, tiny_tokenizer, name, trainer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = models[name]
    model.resize_token_embeddings(len(tiny_tokenizer))
    model.save_pretrained(tmp_path / "model")
    rows = {"SFT": {"text": "the fox"}, "DPO": {"prompt": "the", "chosen": " fox", "rejected": " dog"}}[trainer]
    arguments = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    config = getattr(trl, f"{trainer}Config")(output_dir=str(tmp_path / "run"), max_length=16, **arguments)
    loaded, data = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), Dataset.from_list([rows] * 4)
    trainer_class = getattr(trl, f"{trainer}Trainer")
    train = trainer_class(loaded, args=config, train_dataset=data, processing_class=tiny_tokenizer).train
    with pytest.raises(ValueError, match="bd3lm train"):
        train()
