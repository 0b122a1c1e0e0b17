"""A saved SSD-LM needs nothing but transformers, whatever encoder is inside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, pipeline

import bd3lm_hf
from bd3lm_hf import SSDLMConfig, SSDLMForMaskedLM


MODELING = Path(bd3lm_hf.modeling.__file__).parent


@pytest.fixture
def folder(tiny_tokenizer, randomize, tmp_path) -> Path:
    """A checkpoint with tokenizer, and what its model says."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    special = {name: getattr(tiny_tokenizer, name) for name in names}
    encoder = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = randomize(
        SSDLMForMaskedLM(SSDLMConfig(encoder_config=encoder, **special, block_size=4, model_length=24))
    ).eval()
    model.generation_config.num_denoising_steps = 3
    tiny_tokenizer.padding_side = "left"
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    ids = torch.tensor([[0, 5, 6, 7]])
    text = model.generate(ids, max_new_tokens=7, generator=torch.Generator().manual_seed(0))
    torch.save({"logits": model(**model.dummy_inputs).logits.detach(), "text": text}, tmp_path / "expected.pt")
    return tmp_path / "model"


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
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

torch.set_num_threads(1)
folder = Path(sys.argv[1])
expected = torch.load(folder.parent / "expected.pt")
ids = torch.tensor([[0, 5, 6, 7]])

def check(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "SSDLMConfig" and type(config).__module__.startswith("transformers_modules")
    for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM):
        model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        model.eval()
        torch.testing.assert_close(model(**model.dummy_inputs).logits, expected["logits"])
        text = model.generate(ids, max_new_tokens=7, generator=torch.Generator().manual_seed(0))
        assert torch.equal(text, expected["text"])
        assert type(model.generation_config).__name__ == "SSDLMGenerationConfig"
    return model

model = check(folder)
again = folder.parent / "again"
model.save_pretrained(again)
assert sorted(p.name for p in again.glob("*.py")) == sorted(p.name for p in folder.glob("*.py"))
old, new = (json.loads((place / "config.json").read_text()) for place in (folder, again))
old["encoder_config"]["dtype"] = new["encoder_config"]["dtype"]  # known once it is loaded
assert old == new
check(again)

write = pipeline("text-generation", model=str(folder), trust_remote_code=True)
many = write(["A", "The quick brown fox"], max_new_tokens=5, batch_size=2)
assert [result[0]["generated_text"][: len(start)] for start, result in zip(["A", "The"], many)] == ["A", "The"]
loss = model(input_ids=torch.arange(4, 16)[None], labels=torch.arange(4, 16)[None]).loss
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


def test_the_code_that_is_needed_is_saved_and_nothing_else(folder):
    needed, waiting = set(), {"modeling_ssdlm.py"}
    while waiting:
        name = waiting.pop()
        needed.add(name)
        lines = (MODELING / name).read_text(encoding="utf-8").splitlines()
        waiting |= {line.split()[1][1:] + ".py" for line in lines if line.startswith("from .")} - needed
    assert {path.name for path in folder.glob("*.py")} == needed
    assert "modeling_bd3lm.py" not in needed  # nothing of another network
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_ssdlm.SSDLMConfig",
        "AutoModelForMaskedLM": "modeling_ssdlm.SSDLMForMaskedLM",
        "AutoModelForCausalLM": "modeling_ssdlm.SSDLMForMaskedLM",
    }


def test_with_the_package_imported_no_remote_code_is_needed(folder):
    for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM):
        model, info = auto_class.from_pretrained(folder, output_loading_info=True)
        assert type(model) is SSDLMForMaskedLM and not any(info.values())
    assert type(AutoConfig.from_pretrained(folder)) is SSDLMConfig


def test_the_text_generation_pipeline_trims_to_what_was_asked(folder):
    write = pipeline("text-generation", model=str(folder))
    ids = write("A block is", max_new_tokens=6, return_tensors=True)[0]["generated_token_ids"]
    assert len(ids) <= len(write.tokenizer("A block is").input_ids) + 6


def test_the_command_line_writes_with_its_own_choices(folder, bd3lm):
    words = ["generate", "--model", folder, "--prompt", "A block", "--max-new-tokens", 6, "--num-denoising-steps", 2]
    code, text, errors = bd3lm(*words, "--context", "previous_block", "--projection", "uneven", "--top-p", 0.8)
    assert code == 0 and text.startswith("A block"), errors
    code, _, errors = bd3lm(*words, "--sampler", "confidence")
    assert code == 2 and "sampler" in errors and "Traceback" not in errors


def test_the_choices_of_simplex_diffusion_are_refused_by_other_models(model_folder, bd3lm):
    code, _, errors = bd3lm("generate", "--model", model_folder, "--prompt", "A", "--projection", "even")
    assert code == 2 and "projection" in errors
