"""A saved folder is all that a machine with transformers needs; with bd3lm_hf imported it needs no remote code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    pipeline,
)

import bd3lm_hf
from bd3lm_hf import ARConfig, ARForCausalLM, MDLMConfig, MDLMForMaskedLM, SEDDConfig, SEDDForMaskedLM
from bd3lm_hf.modeling.backbone_bd3lm import BD3LMModel
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


MODELING = Path(bd3lm_hf.modeling.__file__).parent
AUTO_MAP = {
    "AutoConfig": "configuration_bd3lm.BD3LMConfig",
    "AutoModel": "backbone_bd3lm.BD3LMModel",
    "AutoModelForMaskedLM": "modeling_bd3lm.BD3LMForMaskedLM",
    "AutoModelForCausalLM": "modeling_bd3lm.BD3LMForMaskedLM",
}
IDS = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 11]])


@pytest.fixture
def speaker(tiny_config, tiny_tokenizer, randomize) -> BD3LMForMaskedLM:
    """A model that reads and writes the text of the tiny tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    fields = {"vocab_size": len(tiny_tokenizer), **{name: getattr(tiny_tokenizer, name) for name in names}}
    return randomize(BD3LMForMaskedLM(BD3LMConfig(**{**tiny_config.to_diff_dict(), **fields}))).eval()


@pytest.fixture
def folder(speaker, tiny_tokenizer, tmp_path) -> Path:
    """A checkpoint with tokenizer, and what its model says to `IDS`."""
    tiny_tokenizer.padding_side = "left"
    speaker.generation_config.nucleus_p = 0.9
    speaker.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.save(
            {
                "logits": speaker(IDS).logits,
                "hidden": speaker.backbone(IDS).last_hidden_state,
                "text": speaker.generate(IDS, max_new_tokens=9, do_sample=False),
            },
            tmp_path / "expected.pt",
        )
    return tmp_path / "model"


# What a foreign process runs: bd3lm_hf cannot be imported there. Reads the folder's name from the command line.
ELSEWHERE = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bd3lm_hf":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, Trainer, pipeline
)

torch.set_num_threads(1)
folder = Path(sys.argv[1])
expected = torch.load(folder.parent / "expected.pt")
ids = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 11]])

def check(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "BD3LMConfig" and type(config).__module__.startswith("transformers_modules")
    with torch.no_grad():
        backbone = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(backbone).__name__ == "BD3LMModel"
        assert torch.equal(backbone(ids).last_hidden_state, expected["hidden"])
        for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM):
            model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
            assert not any(info.values()), info
            assert torch.equal(model.eval()(ids).logits, expected["logits"])
            assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), expected["text"])
            assert type(model.generation_config).__name__ == "BD3LMGenerationConfig"
            assert model.generation_config.nucleus_p == 0.9
    return model

model = check(folder)
check(folder)  # a second time, from the code cache
again = folder.parent / "again"
model.save_pretrained(again)
assert sorted(p.name for p in again.glob("*.py")) == sorted(p.name for p in folder.glob("*.py"))
assert (again / "config.json").read_text() == (folder / "config.json").read_text()
check(again)

write = pipeline("text-generation", model=str(folder), trust_remote_code=True)
one = write("A block is", max_new_tokens=5)
assert one[0]["generated_text"].startswith("A block is") and len(one[0]["generated_text"]) > len("A block is")
prompts = ["A", "The quick brown fox jumps over"]
many = write(prompts, max_new_tokens=5, batch_size=2, do_sample=False)
for prompt, result in zip(prompts, many, strict=True):
    assert result == write(prompt, max_new_tokens=5, do_sample=False), (result, prompt)
fill = pipeline("fill-mask", model=str(folder), trust_remote_code=True, top_k=3)
found = fill("A block is <mask> from noise")
assert len(found) == 3 and found[0]["score"] >= found[1]["score"]
tokenizer = AutoTokenizer.from_pretrained(folder)
text = tokenizer("A block is <mask> from noise", return_tensors="pt").input_ids
place = int((text[0] == tokenizer.mask_token_id).nonzero())
best = model(text).logits[0, place].topk(3).indices.tolist()
assert [x["token"] for x in found] == best

loss = model(input_ids=ids, labels=ids).loss
assert loss.isfinite() and not any(name.partition(".")[0] == "bd3lm_hf" for name in sys.modules)
print("all is well")
"""


def test_the_folder_needs_nothing_but_transformers(folder, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_HOME"] = str(tmp_path / "home")
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("all is well")


BASELINES = [(ARForCausalLM, ARConfig), (MDLMForMaskedLM, MDLMConfig), (SEDDForMaskedLM, SEDDConfig)]
SIZES = {"vocab_size": 12, "model_length": 8, "hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2}


@pytest.mark.parametrize(("model_class", "config_class"), [(BD3LMForMaskedLM, BD3LMConfig), *BASELINES])
def test_the_code_that_is_needed_is_saved_and_nothing_else(model_class, config_class, tmp_path):
    folder = tmp_path / "model"
    model_class(config_class(**SIZES)).save_pretrained(folder)
    saved = {path.name for path in folder.glob("*.py")}
    needed, waiting = set(), {model_class.__module__.rpartition(".")[2] + ".py"}
    while waiting:
        name = waiting.pop()
        needed.add(name)
        lines = (MODELING / name).read_text(encoding="utf-8").splitlines()
        imported = {line.split()[1][1:] + ".py" for line in lines if line.startswith("from .")}
        waiting |= imported - needed
    assert saved == needed
    for name in saved:
        assert (folder / name).read_bytes() == (MODELING / name).read_bytes()


@pytest.mark.parametrize("part", ["whole model", "backbone"])
def test_every_auto_class_is_named_in_the_config(speaker, tmp_path, part):
    model = speaker if part == "whole model" else speaker.backbone
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_foreign_auto_map_is_replaced(speaker, tmp_path):
    # As published: a module that is not there, a class that has another name, and one of another repository.
    speaker.config.auto_map = {
        "AutoConfig": "configuration.BD3LMConfig",
        "AutoModelForMaskedLM": "owner/name--modeling_bd3lm.BD3LM",
        "AutoModelForSequenceClassification": "modeling.Else",
    }
    speaker.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [(AutoModel, BD3LMModel), (AutoModelForMaskedLM, BD3LMForMaskedLM), (AutoModelForCausalLM, BD3LMForMaskedLM)],
)
def test_with_the_package_imported_no_remote_code_is_needed(folder, auto_class, expected):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert type(model) is expected
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert type(AutoConfig.from_pretrained(folder)) is BD3LMConfig


@pytest.mark.parametrize(("model_class", "config_class"), BASELINES)
def test_every_baseline_is_its_own_class_with_the_package_imported(model_class, config_class, randomize, tmp_path):
    saved = randomize(model_class(config_class(**SIZES))).eval()
    saved.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    known = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoModelForMaskedLM": AutoModelForMaskedLM}
    assert set(names) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} | (
        set() if config_class is ARConfig else {"AutoModelForMaskedLM"}
    )
    for name in names.keys() & known.keys():
        model, info = known[name].from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is model_class and not any(info.values())
        assert all(map(torch.equal, model.state_dict().values(), saved.state_dict().values()))
    assert type(AutoModel.from_pretrained(tmp_path)) is model_class.backbone_class
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class


def test_the_text_generation_pipeline_trims_to_what_was_asked(folder):
    write = pipeline("text-generation", model=str(folder))
    ids = write("A block is", max_new_tokens=6, return_tensors=True)[0]["generated_token_ids"]
    assert len(ids) <= len(write.tokenizer("A block is").input_ids) + 6


def test_the_text_generation_pipeline_stops_at_strings(folder):
    write = pipeline("text-generation", model=str(folder))
    arguments = {"max_new_tokens": 12, "return_full_text": False, "do_sample": False, "repetition_penalty": 9.0}
    plain = write("A block is", **arguments)[0]["generated_text"]
    stop = next(c for c in plain if c.isascii() and c.isalnum())
    text = write("A block is", stop_strings=[stop], tokenizer=write.tokenizer, **arguments)[0]["generated_text"]
    assert plain.startswith(text) and stop in text and len(text) < len(plain)


def test_sampling_in_the_pipeline_keeps_the_saved_nucleus_and_adds_no_top_k(folder, monkeypatch):
    write = pipeline("text-generation", model=str(folder))
    prepare, seen = write.model._prepare_generation_config, []

    def watched(*args, **kwargs):
        prepared = prepare(*args, **kwargs)
        seen.append(prepared[0])
        return prepared

    monkeypatch.setattr(write.model, "_prepare_generation_config", watched)
    write("A block is", max_new_tokens=3)
    assert (seen[0].do_sample, seen[0].nucleus_p, seen[0].top_k) == (True, 0.9, 0)


def test_a_checkpoint_without_weights_files_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForMaskedLM.from_pretrained(folder)


def test_the_tokenizer_of_a_checkpoint_has_the_models_special_tokens(folder):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"):
        assert getattr(tokenizer, name) == getattr(config, name)
