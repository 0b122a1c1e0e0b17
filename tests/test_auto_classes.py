"""A saved folder loads with transformers alone; with bd3lm_hf imported it needs no remote code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared_models import CLASSES, special_ids, tiny_ssdlm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

import bd3lm_hf
from bd3lm_hf import SSDLMConfig, SSDLMForMaskedLM


MODELING = Path(bd3lm_hf.modeling.__file__).parent
AUTO_MAP = {
    "AutoConfig": "configuration_bd3lm.BD3LMConfig",
    "AutoModel": "backbone_bd3lm.BD3LMModel",
    "AutoModelForMaskedLM": "modeling_bd3lm.BD3LMForMaskedLM",
    "AutoModelForCausalLM": "modeling_bd3lm.BD3LMForMaskedLM",
}
SIZES = {"vocab_size": 12, "model_length": 8, "hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2}
FAMILIES = {**CLASSES, "ssdlm": (SSDLMForMaskedLM, SSDLMConfig)}
PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 10, 11]])
MASKS = [[[1] * 5, [0, 0, 1, 1, 1]], [[1] * 5, [1, 1, 1, 0, 0]]]  # padded on the left, and on the right


@pytest.fixture
def make_speaker(tiny_tokenizer, randomize):
    """A function `(family) -> model` whose vocabulary is that of the tiny tokenizer, with a window of 16 tokens."""

    def make(family: str):
        fields = special_ids(tiny_tokenizer) | {"model_length": 16, "vocab_size": len(tiny_tokenizer)}
        if family == "ssdlm":
            return randomize(tiny_ssdlm(**fields))
        model_class, config_class = FAMILIES[family]
        model = randomize(model_class(config_class(**{**SIZES, "dropout": 0.0, **fields}))).eval()
        if family == "bd3lm":
            model.generation_config.nucleus_p = 0.9
        return model

    return make


@pytest.fixture
def make_folder(make_speaker, tiny_tokenizer, tmp_path):
    """A function `(family) -> folder` that saves a checkpoint, its tokenizer and its model's outputs."""

    def make(family: str) -> Path:
        model, folder = make_speaker(family), tmp_path / family
        tiny_tokenizer.padding_side = "left"
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        # Longer than the window, for those with a sliding one.
        texts = [{"input_ids": PROMPTS, "attention_mask": torch.tensor(mask), "max_new_tokens": 13} for mask in MASKS]
        expected = {
            "config": type(model.config).__name__,
            "generation config": model.generation_config.to_dict(),
            "logits": model(**model.dummy_inputs).logits.detach(),
            "texts": [(words, model.generate(**words, generator=torch.Generator().manual_seed(0))) for words in texts],
        }
        torch.save(expected, folder.with_suffix(".pt"))
        return folder

    return make


@pytest.fixture
def folder(make_folder) -> Path:
    return make_folder("bd3lm")


# Code for a process that cannot import bd3lm_hf. It reads the folders' names from the command line.
ELSEWHERE = """
import json
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bd3lm_hf":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline

torch.set_num_threads(1)

def check(folder, expected):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == expected["config"] and type(config).__module__.startswith("transformers_modules")
    for name in set(config.auto_map) - {"AutoConfig", "AutoModel"}:
        load = getattr(transformers, name).from_pretrained
        model, info = load(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits = model.eval()(**model.dummy_inputs).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-6)
        for words, text in expected["texts"]:
            assert torch.equal(model.generate(**words, generator=torch.Generator().manual_seed(0)), text)
        assert model.generation_config.to_dict() == expected["generation config"]
    if "AutoModel" in config.auto_map:
        backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert type(backbone).__name__ == type(model.backbone).__name__
        assert all(map(torch.equal, backbone.state_dict().values(), model.backbone.state_dict().values()))
    return model

def read_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config.get("encoder_config", {}).pop("dtype", None)  # set by loading
    return config

for folder in map(Path, sys.argv[1:]):
    expected = torch.load(folder.with_suffix(".pt"))
    model = check(folder, expected)
    again = folder.parent / f"{folder.name}-again"
    model.save_pretrained(again)
    assert sorted(p.name for p in again.glob("*.py")) == sorted(p.name for p in folder.glob("*.py"))
    assert read_config(again) == read_config(folder)
    assert all(p.read_bytes() == (folder / p.name).read_bytes() for p in again.iterdir() if p.name != "config.json")

    write = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    prompts = ["A block is", "The quick brown"]
    many = write(prompts, max_new_tokens=5, batch_size=2, do_sample=False)
    for prompt, result in zip(prompts, many, strict=True):
        assert result[0]["generated_text"].startswith(prompt) and result[0]["generated_text"] != prompt
        assert folder.name == "ssdlm" or result == write(prompt, max_new_tokens=5, do_sample=False), (result, prompt)
    ids = torch.arange(4, 16)[None]
    assert model(input_ids=ids, labels=ids).loss.isfinite()

    if folder.name == "bd3lm":
        fill = pipeline("fill-mask", model=str(folder), trust_remote_code=True, top_k=3)
        found = fill("A block is <mask> from noise")
        assert len(found) == 3 and found[0]["score"] >= found[1]["score"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer("A block is <mask> from noise", return_tensors="pt").input_ids
        position = int((text[0] == tokenizer.mask_token_id).nonzero())
        assert [x["token"] for x in found] == model(text).logits[0, position].topk(3).indices.tolist()

assert not any(name.partition(".")[0] == "bd3lm_hf" for name in sys.modules)
print("all is well")
"""


def test_the_folders_of_all_families_need_nothing_but_transformers(make_folder, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", ELSEWHERE, *map(make_folder, FAMILIES)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("all is well")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_that_is_needed_is_saved_and_nothing_else(make_speaker, tmp_path, family):
    model = make_speaker(family)
    model.save_pretrained(tmp_path)
    saved = {path.name for path in tmp_path.glob("*.py")}
    needed, waiting = set(), {FAMILIES[family][0].__module__.rpartition(".")[2] + ".py"}
    while waiting:
        name = waiting.pop()
        needed.add(name)
        lines = (MODELING / name).read_text(encoding="utf-8").splitlines()
        waiting |= {line.split()[1][1:] + ".py" for line in lines if line.startswith("from .")} - needed
    assert saved == needed
    assert family != "ssdlm" or "modeling_bd3lm.py" not in needed  # nothing of another network
    for name in saved:
        assert (tmp_path / name).read_bytes() == (MODELING / name).read_bytes()


def test_every_auto_class_is_named_in_the_config_and_a_foreign_map_is_replaced(make_speaker, tmp_path):
    speaker = make_speaker("bd3lm")
    speaker.save_pretrained(tmp_path / "whole")
    speaker.backbone.save_pretrained(tmp_path / "backbone")
    # As published: a missing module, a class with another name, and one from another repository.
    speaker.config.auto_map = {
        "AutoConfig": "configuration.BD3LMConfig",
        "AutoModelForMaskedLM": "owner/name--modeling_bd3lm.BD3LM",
        "AutoModelForSequenceClassification": "modeling.Else",
    }
    speaker.save_pretrained(tmp_path / "foreign")
    for name in ("whole", "backbone", "foreign"):
        assert json.loads((tmp_path / name / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_its_own_class_with_the_package_imported(make_speaker, family, tmp_path):
    (model_class, config_class), saved = FAMILIES[family], make_speaker(family)
    saved.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    known = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoModelForMaskedLM": AutoModelForMaskedLM}
    left_out = {"ar": {"AutoModelForMaskedLM"}, "ssdlm": {"AutoModel"}}.get(family, set())
    assert set(names) == {"AutoConfig", "AutoModel", *known} - left_out
    for name in names.keys() & known.keys():
        model, info = known[name].from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is model_class and not any(info.values())
        assert all(map(torch.equal, model.state_dict().values(), saved.state_dict().values()))
    if "AutoModel" in names:
        assert type(AutoModel.from_pretrained(tmp_path)) is model_class.backbone_class
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class


def test_a_pipeline_takes_fields_from_the_checkpoint_and_from_its_call_and_adds_no_top_k(folder, monkeypatch):
    write = pipeline("text-generation", model=str(folder))
    prepare, seen = write.model._prepare_generation_config, []

    def watched(*args, **kwargs):
        prepared = prepare(*args, **kwargs)
        seen.append(prepared[0])
        return prepared

    monkeypatch.setattr(write.model, "_prepare_generation_config", watched)
    write("A block is", max_new_tokens=3)
    write("A block is", max_new_tokens=3, sampler="confidence")
    found = [(config.sampler, config.do_sample, config.nucleus_p, config.top_k) for config in seen]
    assert found == [("first_hitting", True, 0.9, 0), ("confidence", True, 0.9, 0)]


def test_simplex_diffusion_has_its_own_choices_on_the_command_line(make_folder, bd3lm):
    words = ["--prompt", "A block", "--max-new-tokens", 6]
    own = ["--num-denoising-steps", 2, "--context", "previous_block", "--projection", "uneven", "--top-p", 0.8]
    ssdlm = make_folder("ssdlm")
    code, text, errors = bd3lm("generate", "--model", ssdlm, *words, *own)
    assert code == 0 and text.startswith("A block"), errors
    for folder, flag in ((ssdlm, "sampler"), (make_folder("bd3lm"), "projection")):
        value = "confidence" if flag == "sampler" else "even"
        code, _, errors = bd3lm("generate", "--model", folder, *words, f"--{flag}", value)
        assert code == 2 and flag in errors and "Traceback" not in errors
