"""`push_to_hub` of a model uploads what `bd3lm push` does, where bd3lm_hf is installed."""

from pathlib import Path

import pytest
from sharing import MemoryHub, add_run, no_check

from bd3lm_hf import BD3LMForMaskedLM
from bd3lm_hf.hub_upload import load_check
from bd3lm_hf.hub_upload import push as push_module
from bd3lm_hf.hub_upload.push import dry_run
from bd3lm_hf.hub_upload.repo_files import files_of, read_contents
from bd3lm_hf.modeling.saving_bd3lm import SelfContainedModel
from bd3lm_hf.sharing import share_folder, write_card


@pytest.fixture
def hub(monkeypatch):
    """The hub that transformers and we talk to; what is uploaded is taken to load by itself."""
    hub = MemoryHub()
    monkeypatch.setattr("bd3lm_hf.sharing.HfApi", lambda token=None: hub)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", hub.no_card)
    monkeypatch.setitem(push_module.write_tree.__kwdefaults__, "check", no_check)
    return hub


@pytest.fixture
def tree(model_folder, tmp_path):
    """A function `() -> {name: bytes}` of what `bd3lm push` of the model's folder would upload."""

    def make():
        dry_run(model_folder, "me/model", tmp_path / "tree", check=no_check)
        return {name: path.read_bytes() for name, path in files_of(tmp_path / "tree").items()}

    return make


def uploaded(hub, repo="me/model", branch="main"):
    return {name: data for name, data in hub.repos[repo][branch].items() if name != ".gitattributes"}


def test_save_pretrained_uploads_what_push_does(hub, model_folder, tree):
    expected = tree()
    model = BD3LMForMaskedLM.from_pretrained(model_folder)
    (model_folder / "optimizer.pt").write_bytes(b"")
    model.save_pretrained(model_folder, push_to_hub=True, repo_id="me/model", commit_message="Mine")
    assert uploaded(hub) == expected
    assert len(hub.commits) == 1 and hub.commits[0].commit_message == "Mine"
    # Our card wins in the folder as well.
    assert (model_folder / "README.md").read_bytes() == expected["README.md"]


def test_push_to_hub_uploads_what_push_does_without_a_tokenizer(hub, model_folder, tree):
    expected = tree()
    model = BD3LMForMaskedLM.from_pretrained(model_folder)
    model.add_model_tags("mine")
    url = model.push_to_hub("me/model", revision="v1", private=True)
    assert url == "https://hub/me/model/commit/1" and hub.private["me/model"] is True
    files = uploaded(hub, branch="v1")
    assert files.keys() == {name for name in expected if not name.startswith("tokenizer")}
    assert all(files[name] == expected[name] for name in files if name not in ("README.md", "manifest.json"))
    assert b"- mine\n" in files["README.md"]


def test_what_can_not_be_shared_is_refused(hub, model_folder):
    model = BD3LMForMaskedLM.from_pretrained(model_folder)
    model.config.mask_token_id = 9
    with pytest.raises(ValueError, match="mask_token_id is 9"):
        model.save_pretrained(model_folder, push_to_hub=True, repo_id="me/model")
    assert not hub.commits


def test_the_code_alone_uploads_as_transformers_does(hub, model_folder, monkeypatch):
    monkeypatch.setattr(SelfContainedModel, "share_folder", None)
    BD3LMForMaskedLM.from_pretrained(model_folder).push_to_hub("me/model")
    files = uploaded(hub)
    assert "model.safetensors" in files and "modeling_bd3lm.py" in files and "manifest.json" not in files


def test_the_package_is_what_makes_the_difference():
    assert SelfContainedModel.share_folder is share_folder


def test_a_folder_is_shared_in_the_background(hub, model_folder):
    job = share_folder(model_folder, "me/model", background=True, message="Later")
    assert job.result().url == "https://hub/me/model/commit/1" and hub.commits[0].commit_message == "Later"


def test_the_check_is_part_of_it(hub, model_folder, monkeypatch):
    monkeypatch.undo()
    checked = []
    monkeypatch.setattr("bd3lm_hf.sharing.HfApi", lambda token=None: hub)
    monkeypatch.setattr(load_check.subprocess, "run", lambda command, **how: checked.append(command) or _Passed())
    share_folder(model_folder, "me/model")
    assert len(checked) == 1 and len(hub.commits) == 1


class _Passed:
    returncode, stderr = 0, ""


def test_a_card_is_written_into_a_folder(model_folder):
    add_run(model_folder)
    write_card(model_folder, read_contents(model_folder).model, "me/model", license="mit")
    text = Path(model_folder, "README.md").read_text()
    assert "license: mit" in text and "# model\n" in text
