"""`bd3lm verify`: 0 for a folder as it was pushed, 1 for one that is not, 2 where there is nothing to verify."""

import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from sharing import hub_failure

import bd3lm_hf
from bd3lm_hf.hub_upload import verify
from bd3lm_hf.hub_upload.manifest import write_manifest


@pytest.fixture
def folder(model_folder):
    write_manifest(model_folder)
    return model_folder


def test_an_intact_folder_is_told_with_its_code(bd3lm, folder):
    code, out, err = bd3lm("verify", folder)
    assert (code, err) == (0, "")
    assert out.startswith("intact: ") and f"code: that of bd3lm_hf {bd3lm_hf.__version__}\n" in out


def test_a_changed_folder_is_told_file_by_file(bd3lm, folder):
    (folder / "config.json").write_text("{}")
    (folder / "noise_bd3lm.py").write_text("")
    (folder / "tokenizer.json").unlink()
    (folder / "more.py").write_text("")
    code, out, _ = bd3lm("verify", folder)
    assert code == 1
    lines = out.splitlines()
    told = {"missing: tokenizer.json", "changed: config.json", "changed: noise_bd3lm.py", "extra: more.py"}
    assert told == set(lines[:-2])
    assert lines[-2].startswith("NOT INTACT: ")
    assert lines[-1] == f"code: not that of bd3lm_hf {bd3lm_hf.__version__}, in more.py, noise_bd3lm.py"


def test_a_folder_without_manifest_is_bad_input(bd3lm, model_folder):
    code, _, err = bd3lm("verify", model_folder)
    assert code == 2 and err.startswith("error: ") and "holds no manifest.json" in err


def test_a_folder_that_is_not_there_is_bad_input(bd3lm):
    code, _, err = bd3lm("verify", "./nowhere")
    assert (code, err) == (2, "error: DIR ./nowhere: there is no such folder.\n")


def test_a_folder_has_no_revision(bd3lm, folder):
    code, _, err = bd3lm("verify", folder, "--revision", "v1")
    assert code == 2 and "which has no revisions" in err


def test_a_repository_is_downloaded_first(bd3lm, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(verify, "snapshot_download", lambda name, revision: asked.append((name, revision)) or folder)
    assert bd3lm("verify", "me/model", "--revision", "v1")[0] == 0
    assert asked == [("me/model", "v1")]


def test_an_unknown_repository_is_bad_input_and_a_broken_hub_is_not(bd3lm, monkeypatch):
    failure = hub_failure(404, "no such thing", RepositoryNotFoundError)

    def fail(name, revision):
        raise failure

    monkeypatch.setattr(verify, "snapshot_download", fail)
    code, _, err = bd3lm("verify", "me/model")
    assert code == 2 and "DIR me/model is no folder here, and no repository that you may read." in err
    failure = hub_failure(503, "out of order")
    code, _, err = bd3lm("verify", "me/model")
    assert code == 1 and err.startswith("error: me/model can not be downloaded: ") and "out of order" in err
