"""A folder that loads by itself passes the check in a process of its own; one that does not is told why."""

import sys
from types import SimpleNamespace

import pytest
import torch
from sharing import make_adapter

from bd3lm_hf import ARConfig, ARForCausalLM, SEDDConfig, SEDDForMaskedLM, SSDLMConfig, SSDLMForMaskedLM
from bd3lm_hf.hub_upload import load_check, standalone
from bd3lm_hf.hub_upload.errors import CheckError
from bd3lm_hf.hub_upload.load_check import check_alone, make_probe
from bd3lm_hf.hub_upload.repo_files import read_contents


@pytest.fixture
def contents(model_folder):
    return read_contents(model_folder)


def check_here(folder, probe):
    """The check without its process, in which the registered classes stand for the folder's."""
    standalone.check(str(folder), probe, code="bd3lm_hf")


def test_a_saved_folder_loads_by_itself_and_computes_the_same_to_the_last_bit(model_folder, contents, monkeypatch):
    # What a process that is not isolated would find.
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    check_alone(model_folder, contents.model)


@pytest.mark.slow
def test_a_folder_that_lacks_code_does_not_pass(model_folder, contents):
    (model_folder / "noise_bd3lm.py").unlink()
    with pytest.raises(CheckError, match=r"does not load by itself, so nothing is uploaded: .*noise_bd3lm"):
        check_alone(model_folder, contents.model)


def test_the_process_inherits_no_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    environment = load_check._environment(str(tmp_path))
    assert "hf_secret" not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["HF_HOME"] == str(tmp_path)


def test_a_process_that_says_nothing_is_told_by_its_exit_code(model_folder, contents, monkeypatch):
    monkeypatch.setattr(load_check.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=-9, stderr="\n"))
    with pytest.raises(CheckError, match="so nothing is uploaded: exit code -9"):
        check_alone(model_folder, contents.model)


def test_the_probe_covers_every_auto_class(contents):
    names = {name.split(".")[1] for name in make_probe(contents.model) if name.startswith("expected.")}
    assert names == {"AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"}


@pytest.mark.parametrize("damage", ["weights", "text"])
def test_a_model_that_computes_something_else_is_found_out(model_folder, contents, damage):
    probe = make_probe(contents.model)
    check_here(model_folder, probe)
    part = "first" if damage == "weights" else "text"
    probe[f"expected.AutoModelForCausalLM.{part}"].view(-1)[-1] += 1
    with pytest.raises(RuntimeError, match=rf"AutoModelForCausalLM computes something else .* \({part}\)"):
        check_here(model_folder, probe)


def test_code_from_elsewhere_is_found_out(model_folder, contents):
    with pytest.raises(RuntimeError, match="AutoModel makes a BD3LMModel of other code than the folder's"):
        standalone.check(str(model_folder), make_probe(contents.model))


def test_missing_weights_are_found_out(model_folder, contents, monkeypatch):
    answer = (contents.model, {"missing_keys": {"head"}, "mismatched_keys": set()})
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lambda *a, **k: answer)
    with pytest.raises(RuntimeError, match=r"AutoModel finds no weights for \['head'\]"):
        check_here(model_folder, make_probe(contents.model))


def test_a_pipeline_that_writes_no_text_is_found_out(model_folder, contents, monkeypatch):
    monkeypatch.setattr("transformers.pipeline", lambda *a, **k: lambda *b, **d: [{"generated_text": None}])
    with pytest.raises(RuntimeError, match="the pipeline writes None"):
        check_here(model_folder, make_probe(contents.model))


def test_an_adapter_is_checked_on_its_base(model_folder, tmp_path):
    folder = make_adapter(model_folder, tmp_path / "adapter")
    adapted = read_contents(folder).model
    probe = make_probe(adapted)
    assert {name.split(".")[1] for name in probe if name.startswith("expected")} == {
        "AutoModelForMaskedLM",
        "AutoModelForCausalLM",
    }
    check_here(folder, probe)
    with adapted.disable_adapter():
        plain = adapted(**adapted.get_base_model().dummy_inputs).logits
    assert not torch.equal(plain, probe["expected.AutoModelForCausalLM.first"])


@pytest.mark.parametrize(("config_class", "model_class"), [(ARConfig, ARForCausalLM), (SEDDConfig, SEDDForMaskedLM)])
def test_baselines_are_checked_likewise(config_class, model_class, randomize, tmp_path):
    config = config_class(vocab_size=48, model_length=16, hidden_dim=32, cond_dim=16, n_blocks=1, n_heads=2)
    model = randomize(model_class(config)).eval()
    model.save_pretrained(tmp_path)
    check_here(tmp_path, make_probe(model))


def test_simplex_diffusion_is_checked_likewise(tmp_path):
    fields = {"hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "block_size": 4, "model_length": 16}
    model = SSDLMForMaskedLM(SSDLMConfig(vocab_size=48, **fields)).eval()
    model.generation_config.num_denoising_steps = 2
    model.save_pretrained(tmp_path)
    check_here(tmp_path, make_probe(model))


def test_where_bd3lm_hf_was_imported_the_check_shows_nothing(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    with pytest.raises(RuntimeError, match="bd3lm_hf was imported here already"):
        standalone.forget_bd3lm_hf()
    monkeypatch.delitem(sys.modules, "bd3lm_hf")
    standalone.forget_bd3lm_hf()
