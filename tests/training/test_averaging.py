import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_runs import losses_of, rows_of
from transformers import Trainer, TrainerCallback
from two_processes import tiny_model

from bd3lm_hf.evaluation.perplexity import perplexity
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.training.interval import search_intervals


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class _Weights(TrainerCallback):
    """Keeps the weights of every evaluation."""

    def __init__(self) -> None:
        self.seen = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights_of(model))


def test_evaluation_scores_and_shows_the_averaged_weights(make_trainer):
    trainer, watch = make_trainer(ema_decay=0.5, eval_strategy="steps", eval_steps=1), _Weights()
    trainer.add_callback(watch)
    trainer.train()
    raw = weights_of(trainer.model)
    assert equal(watch.seen[-1], trainer.average.shadows)
    assert not equal(watch.seen[-1], raw)
    with trainer.averaged_weights() as model, trainer.averaged_weights() as again:
        assert model is again is trainer.model
        expected = perplexity(model, rows_of(6, seed=1), batch_size=8, seed=5)
    assert trainer.state.log_history[-2]["eval_nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert equal(weights_of(trainer.model), raw)
    assert trainer.score(rows_of(6, seed=1)).nll == pytest.approx(expected.nll, rel=1e-6)


def test_the_interval_is_searched_with_the_averaged_weights_for_the_trained_model(make_trainer, monkeypatch):
    trainer = make_trainer(ema_decay=0.5, interval_search=True, eval_strategy="steps", eval_steps=2)
    seen, inner = [], BD3LMForMaskedLM.set_interval
    search = "bd3lm_hf.training.evaluating_trainer.search_intervals"

    def look(model, sequences, **options):
        seen.append(weights_of(model))
        return search_intervals(model, sequences, **options)

    monkeypatch.setattr(search, look)
    monkeypatch.setattr(BD3LMForMaskedLM, "set_interval", lambda self, low, high: inner(self, 0.25, 0.75))
    trainer.train()
    assert equal(seen[0], trainer.average.shadows)
    assert trainer.model.interval() == (0.25, 0.75)


def test_averaging_does_not_change_the_training(make_trainer):
    plain, averaged = make_trainer(max_steps=3), make_trainer(max_steps=3, ema_decay=0.9999, eval_strategy="steps")
    plain.train()
    averaged.train()
    assert losses_of(plain) == losses_of(averaged)
    assert equal(weights_of(plain.model), weights_of(averaged.model))
    assert averaged.average.updates == 3


def test_an_evaluation_that_fails_leaves_the_raw_weights(make_trainer, monkeypatch):
    trainer = make_trainer(ema_decay=0.5)
    trainer.train()
    raw = weights_of(trainer.model)

    def fail(*arguments, **keywords):
        assert equal(weights_of(trainer.model), trainer.average.shadows)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(trainer.model), "token_nll", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.evaluate()
    assert equal(weights_of(trainer.model), raw)
    with trainer.averaged_weights():
        assert equal(weights_of(trainer.model), trainer.average.shadows)


def test_without_an_average_the_weights_are_the_raw_ones(make_trainer):
    trainer = make_trainer(ema_decay=0)
    trainer.train()
    raw = weights_of(trainer.model)
    with trainer.averaged_weights() as model:
        assert equal(weights_of(model), raw)
    assert trainer.average is None


def test_the_saved_model_is_the_average_and_says_so(make_trainer, tmp_path):
    trainer = make_trainer(ema_decay=0.5, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.model.sampling_eps_min.fill_(0.25)
    trainer.save_model()
    exported = BD3LMForMaskedLM.from_pretrained(tmp_path / "run")
    assert equal(weights_of(exported), trainer.average.shadows)
    assert exported.interval() == (0.25, 1.0)
    assert json.loads((tmp_path / "run" / "weights.json").read_text()) == {
        "weights": "average",
        "step": 2,
        "ema_decay": 0.5,
        "ema_warmup": True,
        "ema_updates": 2,
    }
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert equal(weights_of(BD3LMForMaskedLM.from_pretrained(checkpoint)), weights_of(trainer.model))
    assert json.loads((checkpoint / "weights.json").read_text()) == {"weights": "raw", "step": 2}
    assert (checkpoint / "ema.safetensors").is_file()


def test_an_average_goes_on_from_a_checkpoint_bit_for_bit(make_trainer, tmp_path):
    whole = make_trainer(max_steps=4, save_strategy="steps", save_steps=2, ema_decay=0.9)
    whole.train()
    rest = make_trainer(max_steps=4, ema_decay=0.9)
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert rest.average.updates == 4
    assert equal(rest.average.shadows, whole.average.shadows)
    assert losses_of(rest) == losses_of(whole)


def test_a_second_training_starts_a_new_average(make_trainer):
    trainer = make_trainer(ema_decay=0.5)
    trainer.train()
    first = trainer.average
    trainer.train()
    assert trainer.average is not first
    assert trainer.average.updates == 2


def test_a_checkpoint_without_an_average_can_not_be_resumed_with_one(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=1).train()
    resumed = make_trainer(max_steps=3, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"checkpoint-1 holds no ema\.safetensors"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_dropping_an_average_is_said(make_trainer, tmp_path, caplog, monkeypatch):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=1, ema_decay=0.9).train()
    monkeypatch.setattr(logging.getLogger("bd3lm_hf"), "propagate", True)
    make_trainer(max_steps=3).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert "holds averaged weights, which this run drops" in caplog.text


def test_the_best_checkpoints_average_is_saved(make_trainer, tmp_path):
    trainer = make_trainer(
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the last checkpoint is not the best
        ema_decay=0.5,
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name != "checkpoint-3"
    best = load_file(Path(trainer.state.best_model_checkpoint) / "ema.safetensors")
    trainer.save_model()
    assert equal(weights_of(BD3LMForMaskedLM.from_pretrained(tmp_path / "run")), best)


def test_of_a_model_with_adapters_only_these_are_averaged(make_trainer, tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["attn_qkv"]))
    trainer = make_trainer(model=adapted, ema_decay=0.5, save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.average.shadows
    assert all("lora" in name for name in trainer.average.shadows)
    raw = weights_of(adapted)
    trainer.save_model()
    assert equal(weights_of(adapted), raw)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    averaged = {name.replace(".default", ""): shadow for name, shadow in trainer.average.shadows.items()}
    assert equal(saved, averaged)
    assert json.loads((tmp_path / "run" / "weights.json").read_text())["weights"] == "average"


def test_an_average_of_zero_3_is_refused(make_trainer, monkeypatch):
    def enable(self):
        self.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
        self.is_deepspeed_enabled, self.is_fsdp_enabled = True, False

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", enable)
    with pytest.raises(ValueError, match=r"--ema_decay 0\.9 is not kept under DeepSpeed ZeRO-3, .*: use FSDP2"):
        make_trainer(ema_decay=0.9)
