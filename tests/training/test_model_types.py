"""A recipe for one model type, run with another; and every baseline trained, resumed and saved."""

import json
import shutil

import pytest
from shared_models import CLASSES
from tiny_runs import save_recipe
from transformers import AutoModelForCausalLM

from bd3lm_hf import ARConfig, BD3LMConfig, BD3LMForMaskedLM, MDLMConfig, SEDDConfig
from bd3lm_hf.training.command_line import parse_arguments
from bd3lm_hf.training.initial_model import new_config
from bd3lm_hf.training.train import main


SIZES = {"vocab_size": 12, "model_length": 8, "hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2}


@pytest.mark.parametrize("model_type", ["ar", "mdlm", "sedd"])
@pytest.mark.parametrize("recipe", [[], ["demo"], ["owt"]], ids=str)
def test_a_recipe_of_blocks_serves_the_baselines(model_type, recipe):
    arguments = parse_arguments([*recipe, "--model_type", model_type, "--bf16", "false", "--use_cpu"])
    config = new_config(model_type, vocab_size=100, **arguments.model.config_fields())
    assert config.block_size == (1 if model_type == "ar" else config.model_length)
    assert (config.sampling_eps_min, config.sampling_eps_max) == (1e-3, 1.0)
    assert config.hidden_dim == (768 if recipe == ["owt"] else 128)
    assert not arguments.training.interval_search and arguments.training.final_estimator is None


def test_ignored_fields_are_named(monkeypatch, tmp_path):
    notes = []
    monkeypatch.setattr("bd3lm_hf.training.initial_model.logger.warning", notes.append)
    parse_arguments(["--model_type=ar"])
    left_out = "block_size, sampling_eps_min, sampling_eps_max, final_estimator"
    assert notes == [f"--model_type ar ignores fields that the recipe sets for another model type: {left_out}."]
    # Nothing is left out of a recipe for its own type.
    assert parse_arguments(["--model_type", "bd3lm"]).model.block_size == 4
    (tmp_path / "own.yaml").write_text("model_type: mdlm\nsampling_eps_min: 0.2\n")
    arguments = parse_arguments([str(tmp_path / "own.yaml"), "--model_type", "mdlm"])
    assert arguments.model.sampling_eps_min == 0.2


@pytest.mark.parametrize("model_type", ["ar", "mdlm", "sedd"])
def test_every_model_type_trains_evaluates_and_resumes(model_type, tmp_path):
    fields = {"model_type": model_type, "block_size": None, "final_estimator": None, "max_steps": 4, "use_cpu": True}
    fields |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    recipe = str(save_recipe(tmp_path, **fields, output_dir=str(tmp_path / "run")))

    def train(*words: str) -> dict:
        main([recipe, *words])
        return json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))

    whole = train()
    assert 1 < whole["after"]["perplexity"] < whole["before"]["perplexity"]
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = train("--resume_from_checkpoint", "true")
    assert resumed["steps"] == 4 and resumed["before"] is None
    assert resumed["after"]["nll"] == pytest.approx(whole["after"]["nll"], abs=1e-6)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == model_type


@pytest.mark.parametrize(("model_class", "config_class"), [CLASSES[name] for name in ("ar", "mdlm", "sedd")])
def test_the_wrong_class_names_the_right_ones(model_class, config_class, tmp_path):
    model_class(config_class(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model_type='{config_class.model_type}'.*AutoModelForCausalLM"):
        BD3LMForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"BD3LMForMaskedLM .*='{config_class.model_type}'"):
        BD3LMForMaskedLM(config_class(**SIZES))
    BD3LMForMaskedLM(BD3LMConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='bd3lm', not of a .*AutoModelForCausalLM"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (SEDDConfig, {"time_conditioning": False}, "time_conditioning=False does not fit model_type='sedd'"),
        (ARConfig, {"cross_attn": True}, "causal=True contradicts cross_attn=True"),
        (ARConfig, {"causal": False}, "causal=False does not fit model_type='ar'"),
        (ARConfig, {"time_conditioning": True}, "time_conditioning=True does not fit model_type='ar'"),
        (ARConfig, {"block_size": 3}, r"block_size=3 does not fit model_type='ar': .*leave it out \(it is 1\)"),
        (MDLMConfig, {"cross_attn": True}, "cross_attn=True does not fit model_type='mdlm'"),
        (MDLMConfig, {"causal": True}, "causal=True does not fit model_type='mdlm'"),
        (MDLMConfig, {"block_size": 4}, r"block_size=4 does not fit model_type='mdlm': .*leave it out \(it is 1024\)"),
    ],
)
def test_contradictory_flags_are_refused(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)
