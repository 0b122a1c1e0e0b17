"""Checkpoints and adapters are loaded whole or refused; adapters train, save and merge as in peft."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_runs import losses_of, rows_of
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bd3lm_hf.checkpoints import adapter_base, add_adapters, load_model, merge_adapter
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.training.trainer import BD3LMTrainer


# peft uses a deprecated attribute of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def base(tiny_model, tmp_path) -> Path:
    """A saved model."""
    tiny_model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def model(base):
    return AutoModelForCausalLM.from_pretrained(base)


def fill(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Fill the adapters with random numbers: fresh ones change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def batch(rows: int = 4, length: int = 32) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 47, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :8] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    return model(**batch()).loss


# Which layers


def test_a_plain_configuration_adapts_attention_and_mlp_of_every_layer(model) -> None:
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    names = set(adapted.targeted_module_names)
    layers = {f"backbone.blocks.{i}.{name}" for i in range(2) for name in BD3LMForMaskedLM.lora_targets}
    assert layers | {"backbone.sigma_map.mlp.0", "backbone.sigma_map.mlp.2"} == names
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {
        name for name, _ in adapted.named_parameters() if "lora_" in name
    }


def test_all_linear_adapts_everything_but_the_head(model) -> None:
    names = add_adapters(model, rank=2, targets=["all-linear"]).targeted_module_names
    assert "backbone.blocks.1.adaLN_modulation" in names
    assert "backbone.output_layer.adaLN_modulation" in names
    assert "backbone.output_layer.linear" not in names


def test_an_unknown_layer_name_is_refused_with_the_known_names(model) -> None:
    with pytest.raises(ValueError, match=r"q_proj.* are adaLN_modulation, attn_out, attn_qkv, linear, mlp\.0"):
        add_adapters(model, rank=2, targets=["q_proj"])


# `linear` is the head.
EVERY_KIND = [list(BD3LMForMaskedLM.lora_targets), ["attn_qkv"], ["mlp.2"], ["adaLN_modulation"], ["linear"]]
EVERY_KIND += [["vocab_embed"], ["all-linear"]]


@pytest.mark.parametrize("targets", EVERY_KIND, ids=lambda names: "+".join(names))
def test_an_adapted_model_and_its_gradients_are_those_of_the_merged_weights(base, targets) -> None:
    plain, *others = (AutoModelForCausalLM.from_pretrained(base) for _ in range(3))
    adapted, merged = (fill(add_adapters(other, rank=2, alpha=2, targets=targets)) for other in others)
    merged = merged.merge_and_unload()
    assert type(merged) is BD3LMForMaskedLM
    ids = batch()["input_ids"]
    for training in (True, False):
        for one in (adapted, merged, plain):
            one.train(training)
        assert loss_of(adapted).item() == pytest.approx(loss_of(merged).item(), rel=1e-5)
        assert loss_of(adapted).item() != pytest.approx(loss_of(plain).item(), rel=1e-4)
        one, other = (m.token_nll(ids, estimator="exact").nll for m in (adapted, merged))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    texts = [m.generate(ids[:, :8], max_new_tokens=8, do_sample=False) for m in (adapted, merged)]
    assert torch.equal(*texts)
    # With W' = W + s B A, the chain rule gives dL/dA = s B^T dL/dW' and dL/dB = s dL/dW' A^T.
    loss_of(adapted.train()).backward()
    loss_of(merged.requires_grad_(True).train()).backward()
    assert adapted.targeted_module_names
    for name in adapted.targeted_module_names:
        layer, whole = adapted.get_base_model().get_submodule(name), merged.get_submodule(name)
        if name.endswith("vocab_embed"):
            a, b = layer.lora_embedding_A["default"].T, layer.lora_embedding_B["default"].T
            grads = [layer.lora_embedding_A["default"].grad.T, layer.lora_embedding_B["default"].grad.T]
            full = whole.weight.grad
            expected = [full @ b.T * layer.scaling["default"], full.T @ a * layer.scaling["default"]]
            torch.testing.assert_close(grads, [expected[0], expected[1].T], rtol=1e-3, atol=1e-5)
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            scale, full = layer.scaling["default"], whole.weight.grad
            torch.testing.assert_close(a.grad, scale * b.T @ full, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(b.grad, scale * full @ a.T, rtol=1e-3, atol=1e-5)


# Training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapter_weights_train_and_the_stock_trainer_can_do_it(model, base, tmp_path, checkpointing) -> None:
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    options |= {"disable_tqdm": True, "use_cpu": True, "gradient_checkpointing": checkpointing}
    settings = TrainingArguments(str(tmp_path / "run"), **options)
    trainer = Trainer(model=adapted, args=settings, train_dataset=rows_of(16))
    trainer.train()
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    trainer.save_model()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.fixture
def our_trainer(base, make_trainer):
    """A function that makes a trainer of fresh adapters, evaluated and saved after every second of four steps."""

    def make(**changes) -> BD3LMTrainer:
        torch.manual_seed(0)
        adapted = add_adapters(AutoModelForCausalLM.from_pretrained(base), rank=4, dropout=0.1)
        steps = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        return make_trainer(adapted, **{**steps, **changes})

    return make


def test_our_trainer_evaluates_saves_and_resumes_adapters(our_trainer, base, tmp_path) -> None:
    whole = our_trainer()
    start = whole.score(whole.eval_dataset).nll
    whole.train()
    whole.save_model()
    assert whole.evaluate()["eval_nll"] != pytest.approx(start, rel=1e-5)
    rest = our_trainer()
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses_of(rest)[-2:] == losses_of(whole)[-2:]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    whole.model = loaded
    assert whole.score(whole.eval_dataset).nll == pytest.approx(rest.score(rest.eval_dataset).nll, abs=1e-6)


def test_adapters_do_not_save_an_interval_so_none_is_searched(our_trainer) -> None:
    with pytest.raises(ValueError, match="interval_search would find an interval"):
        our_trainer(interval_search=True)


# Folders


@pytest.fixture
def saved(base, tmp_path) -> Path:
    adapted = fill(add_adapters(AutoModelForCausalLM.from_pretrained(base), rank=2))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_saved_adapter_is_loaded_merged_wherever_a_model_is_named(base, saved, recwarn) -> None:
    assert adapter_base(str(saved)) == str(base)
    assert adapter_base(str(base)) is None
    loaded = load_model(str(saved))
    assert type(loaded) is BD3LMForMaskedLM and not recwarn
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved).eval()
    assert loss_of(loaded.eval()).item() == pytest.approx(loss_of(adapted).item(), rel=1e-5)


def test_an_adapter_without_its_base_is_refused(base, saved) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name the model that it was trained on"):
        load_model(str(saved))
    missing = str(base.with_name("gone"))
    (saved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": missing}))
    with pytest.raises(ValueError, match=rf"--model {saved} on {missing}: there is no such folder"):
        load_model(str(saved))


def test_an_adapter_of_another_model_or_a_broken_one_is_refused(tiny_config, saved, base) -> None:
    tiny_config.hidden_dim = 16
    with pytest.raises(ValueError, match="adapter .* cannot be applied to its base model: RuntimeError"):
        merge_adapter(BD3LMForMaskedLM(tiny_config), str(saved))
    (saved / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="adapter .* cannot be applied to its base model"):
        load_model(str(saved))


# Checkpoints


def test_an_interval_that_the_weights_lack_comes_from_the_configuration(tiny_model, tmp_path):
    tiny_model.set_interval(0.3, 0.8)
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["sampling_eps_min"], weights["sampling_eps_max"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(tmp_path)).interval() == pytest.approx((0.3, 0.8))


def test_weights_that_are_a_pointer_of_git_lfs_are_named(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"model\.safetensors is a pointer of Git LFS.*git lfs pull"):
        load_model(str(tmp_path))
