import json
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from published import GOLDEN, load_recorded
from safetensors.torch import load_file, save_file
from tiny_runs import losses_of, rows_of, trained
from torch import nn
from transformers import Trainer, TrainerCallback
from two_processes import tiny_model

from bd3lm_hf.evaluation.perplexity import perplexity
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.run_folder import EMA_NAME
from bd3lm_hf.training.ema import AverageCallback, WeightAverage
from bd3lm_hf.training.interval import search_intervals


def layer_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2).to(dtype)


def change(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("warmup", "shadow"), [(True, "shadow"), (False, "shadow_const")])
def test_the_average_is_the_published_one(warmup, shadow):
    golden, settings = load_recorded("09_ema"), json.loads((GOLDEN / "09_ema" / "config.json").read_text())
    model = nn.ParameterList([nn.Parameter(golden[f"init.{i}"].clone()) for i in range(2)])
    decay = settings["decay"] if warmup else settings["constant_decay"]
    average = WeightAverage(model, decay=decay, warmup=warmup)
    for update in range(settings["updates"]):
        for i, parameter in enumerate(model):
            parameter.data.copy_(golden[f"params.{i}"][update])
        average.update()
        for i in range(2):
            expected = golden[f"{shadow}.{i}"][update]
            torch.testing.assert_close(average.shadows[str(i)], expected, rtol=1e-6, atol=1e-6)
    assert average.updates == settings["updates"]


def test_warm_up_ends_at_the_decay():
    average = WeightAverage(layer_of(), decay=0.9999)
    assert average.decay_of(1) == 2 / 11
    assert average.decay_of(89_980) < 0.9999
    assert average.decay_of(100_000) == average.decay_of(1_000_000) == 0.9999


def test_low_precision_weights_are_averaged_in_float32():
    model = layer_of(dtype=torch.bfloat16)
    average = WeightAverage(model, decay=0.99, warmup=False)
    start = model.weight.detach().float().clone()
    change(model, 1)
    average.update()
    expected = 0.99 * start + 0.01 * model.weight.detach().float()
    assert average.shadows["weight"].dtype == torch.float32
    torch.testing.assert_close(average.shadows["weight"], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(average.shadows["weight"].bfloat16().float(), average.shadows["weight"])
    raw = model.weight.detach().clone()
    with average.swapped():
        assert torch.equal(model.weight, expected.bfloat16())
    assert torch.equal(model.weight, raw)


def test_an_exception_restores_the_weights_bit_for_bit():
    model = layer_of()
    average = WeightAverage(model, decay=0.5)
    change(model, 1)
    average.update()
    raw, shadows = weights_of(model), {name: shadow.clone() for name, shadow in average.shadows.items()}
    with pytest.raises(ZeroDivisionError), average.swapped():
        assert equal(weights_of(model), shadows)
        model.weight.data.zero_()
        1 / 0  # noqa: B018
    assert equal(weights_of(model), raw) and equal(average.shadows, shadows)


@pytest.mark.parametrize("shapes", [{"weight": (2, 3)}, {"weight": (5, 3), "bias": (2,)}])
def test_the_average_of_another_model_is_refused(tmp_path, shapes):
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / EMA_NAME, metadata={"updates": "1"})
    with pytest.raises(ValueError, match="averages of other weights than this run trains"):
        WeightAverage(layer_of(), decay=0.9).load(tmp_path)


def test_a_step_that_the_loss_scaler_skipped_is_no_update():
    callback = AverageCallback(0.9, True)
    average = callback.start(layer_of())
    for skipped in (False, True):
        callback.on_step_end(None, None, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
    assert average.updates == 1


def test_evaluation_scores_and_shows_the_averaged_weights(make_trainer):
    trainer, seen = make_trainer(ema_decay=0.5, eval_strategy="steps", eval_steps=1), []
    trainer.add_callback(TrainerCallback())
    trainer.callback_handler.callbacks[-1].on_evaluate = lambda *_, model, **__: seen.append(weights_of(model))
    trainer.train()
    raw = weights_of(trainer.model)
    assert equal(seen[-1], trainer.average.shadows) and not equal(seen[-1], raw)
    with trainer.averaged_weights() as model, trainer.averaged_weights() as again:
        assert model is again is trainer.model
        expected = perplexity(model, rows_of(6, seed=1), batch_size=8, seed=5)
    assert trainer.state.log_history[-2]["eval_nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert equal(weights_of(trainer.model), raw)
    assert trainer.score(rows_of(6, seed=1)).nll == pytest.approx(expected.nll, rel=1e-6)
    first = trainer.average
    assert trained(trainer).average is not first and trainer.average.updates == 2  # each training has its own


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
    plain = trained(make_trainer(max_steps=3, ema_decay=0))
    averaged = trained(make_trainer(max_steps=3, ema_decay=0.9999, eval_strategy="steps"))
    assert losses_of(plain) == losses_of(averaged)
    assert equal(weights_of(plain.model), weights_of(averaged.model))
    assert (plain.average, averaged.average.updates) == (None, 3)


def test_the_saved_model_is_the_average_and_says_so(make_trainer, tmp_path):
    trainer = trained(make_trainer(ema_decay=0.5, ema_warmup=False, save_strategy="steps", save_steps=2))
    trainer.model.sampling_eps_min.fill_(0.25)
    trainer.save_model()
    exported = BD3LMForMaskedLM.from_pretrained(tmp_path / "run")
    assert equal(weights_of(exported), trainer.average.shadows)
    assert exported.interval() == (0.25, 1.0)
    settings = {"ema_decay": 0.5, "ema_warmup": False, "ema_updates": 2}
    assert json.loads((tmp_path / "run" / "weights.json").read_text()) == {"weights": "average", "step": 2, **settings}
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert equal(weights_of(BD3LMForMaskedLM.from_pretrained(checkpoint)), weights_of(trainer.model))
    assert json.loads((checkpoint / "weights.json").read_text()) == {"weights": "raw", "step": 2}
    assert (checkpoint / "ema.safetensors").is_file()


def test_a_checkpoint_without_an_average_cannot_be_resumed_with_one(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=1).train()
    message = r"checkpoint-1 holds no ema\.safetensors: .* --ema_decay 0\.9 .*--ema_decay 0,"
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=3, ema_decay=0.9).train(str(tmp_path / "run" / "checkpoint-1"))


def test_dropping_an_average_is_warned_about(make_trainer, tmp_path, caplog, monkeypatch):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=1, ema_decay=0.9).train()
    monkeypatch.setattr(logging.getLogger("bd3lm_hf"), "propagate", True)
    make_trainer(max_steps=3).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert "has averaged weights, which this run drops" in caplog.text


def test_the_best_checkpoint_is_kept_and_its_average_saved(make_trainer, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    # The best has the largest loss, so that it is not the last one.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trained(make_trainer(max_steps=3, ema_decay=0.5, save_total_limit=1, **steps, **best))
    kept = tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(kept) and kept.name != "checkpoint-3"
    best = load_file(kept / "ema.safetensors")
    trainer.save_model()
    assert equal(weights_of(BD3LMForMaskedLM.from_pretrained(tmp_path / "run")), best)


def test_only_the_adapters_of_a_model_are_averaged(make_trainer, tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["attn_qkv"]))
    trainer = trained(make_trainer(model=adapted, ema_decay=0.5, save_strategy="steps", save_steps=2))
    assert trainer.average.shadows and all("lora" in name for name in trainer.average.shadows)
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
    with pytest.raises(ValueError, match=r"--ema_decay 0\.9 is not supported with DeepSpeed ZeRO-3, .*: use FSDP2"):
        make_trainer(ema_decay=0.9)
