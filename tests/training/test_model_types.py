"""A recipe for one model type, run with another; and every baseline trained, resumed, saved and loaded elsewhere."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from bd3lm_hf import (
    ARConfig,
    ARForCausalLM,
    BD3LMConfig,
    BD3LMForMaskedLM,
    MDLMConfig,
    MDLMForMaskedLM,
    SEDDConfig,
    SEDDForMaskedLM,
)
from bd3lm_hf.training.command_line import parse_arguments
from bd3lm_hf.training.initial_model import new_config
from bd3lm_hf.training.train import main


DIFFUSION = [(MDLMForMaskedLM, MDLMConfig), (SEDDForMaskedLM, SEDDConfig)]
ALL = [(ARForCausalLM, ARConfig), *DIFFUSION]
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


def test_what_is_left_out_is_said(monkeypatch):
    notes = []
    monkeypatch.setattr("bd3lm_hf.training.initial_model.logger.warning", notes.append)
    parse_arguments(["--model_type=ar"])
    left_out = "block_size, sampling_eps_min, sampling_eps_max, final_estimator"
    assert notes == [f"--model_type ar leaves out what the recipe sets for another model type: {left_out}."]


def test_nothing_is_left_out_of_a_recipe_for_its_own_type(tmp_path):
    assert parse_arguments(["--model_type", "bd3lm"]).model.block_size == 4
    (tmp_path / "own.yaml").write_text("model_type: mdlm\nsampling_eps_min: 0.2\n")
    arguments = parse_arguments([str(tmp_path / "own.yaml"), "--model_type", "mdlm"])
    assert arguments.model.sampling_eps_min == 0.2


@pytest.mark.parametrize("model_type", ["ar", "mdlm", "sedd"])
@pytest.mark.parametrize("block_size", ["3", "4"])
def test_a_block_size_of_the_command_line_is_an_error(model_type, block_size, text_file, tmp_path, capsys):
    words = ["--model_type", model_type, "--block_size", block_size, "--dataset", str(text_file)]
    with pytest.raises(SystemExit):
        main([*words, "--use_cpu", "--output_dir", str(tmp_path / "run")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: block_size={block_size} does not fit model_type='{model_type}'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model_type", ["ar", "mdlm", "sedd", "bd3lm"])
def test_every_model_type_trains_evaluates_and_resumes(model_type, text_file, tmp_path):
    fields = {
        "model_type": model_type,
        "dataset": text_file,
        "tokenizer": "train",
        "vocab_size": 300,
        "model_length": 16,
        "hidden_dim": 16,
        "cond_dim": 8,
        "n_blocks": 1,
        "n_heads": 2,
        "max_steps": 4,
        "max_eval_samples": 4,
        "eval_steps": 2,
        "warmup_steps": 0,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "sample_tokens": 20,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": tmp_path / "run",
    }

    def run(**changes) -> dict:
        main([word for name, value in {**fields, **changes}.items() for word in (f"--{name}", str(value))])
        return json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))

    whole = run()
    assert 1 < whole["after"]["perplexity"] < whole["before"]["perplexity"]
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = run(resume_from_checkpoint=True)
    assert resumed["steps"] == 4 and resumed["before"] is None
    assert resumed["after"]["nll"] == pytest.approx(whole["after"]["nll"], abs=1e-6)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == model_type


ELSEWHERE = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bd3lm_hf":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    expected = torch.load(folder + "/expected.pt")
    classes = [AutoModelForCausalLM] if folder.endswith("ar") else [AutoModelForCausalLM, AutoModelForMaskedLM]
    for auto_class in classes:
        model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        for side, text in expected.items():
            mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0]])
            ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 10, 11]])
            assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=20), text), side
    again = folder + "-again"
    model.save_pretrained(again)
    assert sorted(p.name for p in Path(again).glob("*.py")) == sorted(p.name for p in Path(folder).glob("*.py"))
    assert Path(again, "config.json").read_text() == Path(folder, "config.json").read_text()
    config = AutoConfig.from_pretrained(again, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules")
    backbone = AutoModel.from_pretrained(again, trust_remote_code=True)
    assert type(backbone).__name__ == type(model.backbone).__name__
    assert all(map(torch.equal, backbone.state_dict().values(), model.backbone.state_dict().values()))
    write = pipeline("text-generation", model=folder, trust_remote_code=True)
    prompts = ["A", "The quick brown fox"]
    many = write(prompts, max_new_tokens=20, batch_size=2, do_sample=False)
    for prompt, result in zip(prompts, many, strict=True):
        assert result[0]["generated_text"].startswith(prompt) and result[0]["generated_text"] != prompt
        assert result == write(prompt, max_new_tokens=20, do_sample=False), (result, prompt)
assert not any(name.partition(".")[0] == "bd3lm_hf" for name in sys.modules)
print("all is well")
"""


def test_folders_of_the_baselines_need_nothing_but_transformers(randomize, tiny_tokenizer, tmp_path):
    # In a window of 16 tokens, which the texts outgrow.
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    fields = {"vocab_size": len(tiny_tokenizer), **{name: getattr(tiny_tokenizer, name) for name in names}}
    tiny_tokenizer.padding_side = "left"
    prompts, folders = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 10, 11]]), []
    for model_class, config_class in ALL:
        model = randomize(model_class(config_class(**{**SIZES, **fields, "model_length": 16}))).eval()
        folder = tmp_path / config_class.model_type
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        masks = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0]}
        expected = {
            side: model.generate(prompts, attention_mask=torch.tensor([[1] * 5, row]), max_new_tokens=20)
            for side, row in masks.items()
        }
        assert all((text[:, :5] == prompts).all() and text.shape[1] > 16 for text in expected.values())
        torch.save(expected, folder / "expected.pt")
        folders.append(str(folder))
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("all is well")


@pytest.mark.parametrize(("model_class", "config_class"), ALL)
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
        (BD3LMConfig, {"causal": True}, "causal=True contradicts cross_attn=True"),
    ],
)
def test_contradictory_flags_are_refused(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


def test_block_diffusion_of_single_tokens_has_the_likelihood_form_of_an_autoregressive_model(randomize):
    # Everything masked: each token's logits see the mask in its place and the clean tokens before it.
    config = BD3LMConfig(**SIZES, block_size=1, ignore_bos=False, dropout=0.0)
    model = randomize(BD3LMForMaskedLM(config)).eval()
    ids = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))
    chain = torch.zeros(3, 8)
    with torch.no_grad():
        for place in range(8):
            text = torch.cat([ids[:, :place], torch.full((3, 1), 11)], dim=1)
            logits = model(text).logits[:, -1, :11]
            chain[:, place] = -logits.log_softmax(-1).gather(1, ids[:, place : place + 1]).squeeze(1)
    for estimator in ("exact", "stratified", "sampled"):
        score = model.token_nll(ids, estimator=estimator)
        torch.testing.assert_close(score.nll, chain, atol=1e-5, rtol=0)
        assert score.mask.all()
    torch.testing.assert_close(model(ids, labels=ids).loss, chain.mean(), atol=1e-5, rtol=0)
    # The draws that mask everything, t = 1 of the whole interval, and then an interval of nothing else.
    full = {"block_noise": torch.ones(3, 8), "token_noise": torch.zeros(3, 8)}
    torch.testing.assert_close(model.train()(ids, labels=ids, **full).loss, chain.mean(), atol=1e-5, rtol=0)
    model.set_interval(1.0, 1.0)
    torch.testing.assert_close(model.train()(ids, labels=ids).loss, chain.mean(), atol=1e-5, rtol=0)
