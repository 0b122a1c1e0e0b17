"""A folder that loads without bd3lm_hf passes the check in a separate process; others fail for a named reason."""

import importlib
import sys

import pytest
import torch
from generating import make_family
from shared_models import make_adapter, tiny_ssdlm

from bd3lm_hf.hub_upload import load_check
from bd3lm_hf.hub_upload.load_check import CheckError, check_loads_alone, isolated_environment, make_probe
from bd3lm_hf.hub_upload.repo_files import read_contents


@pytest.fixture
def contents(model_folder):
    return read_contents(model_folder)


def check_here(folder, probe):
    """Run the check in this process, with the registered classes instead of the folder's."""
    load_check.check(str(folder), probe, code="bd3lm_hf")


def test_a_saved_folder_loads_alone_and_computes_the_same_to_the_last_bit(model_folder, contents, monkeypatch):
    # A process that is not isolated would find the package here.
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    check_loads_alone(model_folder, contents.model)


@pytest.mark.slow
def test_a_folder_that_lacks_code_does_not_pass(model_folder, contents):
    (model_folder / "noise_bd3lm.py").unlink()
    with pytest.raises(CheckError, match="nothing was uploaded: .*noise_bd3lm"):
        check_loads_alone(model_folder, contents.model)


def test_a_process_that_dies_silently_is_reported_by_its_exit_code(model_folder, contents, monkeypatch, tmp_path):
    dies = tmp_path / "dies.py"
    dies.write_text("import sys; sys.exit(9)")
    monkeypatch.setattr(load_check, "__file__", str(dies))
    with pytest.raises(CheckError, match="exit code 9"):
        check_loads_alone(model_folder, contents.model)


def test_the_process_inherits_no_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    environment = isolated_environment(str(tmp_path))
    assert "hf_secret" not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["HF_HOME"] == str(tmp_path)


@pytest.mark.parametrize("part", ["first", "text"])
def test_a_model_with_other_outputs_is_found(model_folder, contents, part):
    probe = make_probe(contents.model)
    names = {name.split(".")[1] for name in probe if name.startswith("expected.")}
    assert names == {"AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"}
    check_here(model_folder, probe)
    probe[f"expected.AutoModelForCausalLM.{part}"].view(-1)[-1] += 1
    with pytest.raises(RuntimeError, match=rf"AutoModelForCausalLM .* \({part}\)"):
        check_here(model_folder, probe)


def test_code_from_elsewhere_missing_weights_and_a_mute_pipeline_are_found(model_folder, contents, monkeypatch):
    probe = make_probe(contents.model)
    with pytest.raises(RuntimeError, match="AutoModel loads BD3LMModel from code that is not in the folder"):
        load_check.check(str(model_folder), probe)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.pipeline", lambda *a, **k: lambda *b, **d: [{"generated_text": None}])
        with pytest.raises(RuntimeError, match="pipeline returns None"):
            check_here(model_folder, probe)
    answer = (contents.model, {"missing_keys": {"head"}, "mismatched_keys": set()})
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lambda *a, **k: answer)
    with pytest.raises(RuntimeError, match=r"AutoModel .*\['head'\]"):
        check_here(model_folder, probe)


def test_an_adapter_is_checked_on_its_base(model_folder, tmp_path):
    folder = make_adapter(model_folder, tmp_path / "adapter")
    adapted = read_contents(folder).model
    probe = make_probe(adapted)
    names = {name.split(".")[1] for name in probe if name.startswith("expected")}
    assert names == {"AutoModelForMaskedLM", "AutoModelForCausalLM"}
    check_here(folder, probe)
    with adapted.disable_adapter():
        plain = adapted(**adapted.get_base_model().dummy_inputs).logits
    assert not torch.equal(plain, probe["expected.AutoModelForCausalLM.first"])


@pytest.mark.parametrize("family", ["ar", "sedd", "ssdlm"])
def test_baselines_are_checked_too(family, tmp_path):
    model = tiny_ssdlm() if family == "ssdlm" else make_family(family).float()
    model.save_pretrained(tmp_path)
    check_here(tmp_path, make_probe(model))


def test_where_bd3lm_hf_was_imported_the_check_proves_nothing(monkeypatch):
    with pytest.raises(RuntimeError, match="bd3lm_hf was imported"):
        load_check.block_bd3lm_hf()
    monkeypatch.delitem(sys.modules, "bd3lm_hf")
    load_check.block_bd3lm_hf()
    with pytest.raises(ImportError):
        importlib.import_module("bd3lm_hf")
