"""`bd3lm push`: bad input is told before any work, a dry run is what a push uploads, a failure changes nothing."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from sharing import JUNK, MemoryHub, add_run, hub_failure, make_adapter, no_check

from bd3lm_hf.hub_upload import load_check
from bd3lm_hf.hub_upload import push as push_module
from bd3lm_hf.hub_upload.errors import CheckError
from bd3lm_hf.hub_upload.push import dry_run, push, write_tree
from bd3lm_hf.hub_upload.repo_files import files_of, kind_of


@pytest.fixture
def run_folder(model_folder):
    return add_run(model_folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub that `bd3lm push` talks to."""
    hub = MemoryHub()
    hub.folder = tmp_path
    monkeypatch.setattr(push_module, "HfApi", lambda: hub)
    return hub


@pytest.fixture
def checked(monkeypatch):
    """The commands of the isolated process, which is taken at its word: it exits with 0."""
    commands = []

    def run(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(load_check.subprocess, "run", run)
    return commands


def contents_of(folder):
    return {name: path.read_bytes() for name, path in files_of(folder).items()}


def test_a_dry_run_writes_the_exact_tree_of_a_push_and_prints_it(bd3lm, run_folder, tmp_path, hub, checked):
    code, out, err = bd3lm("push", run_folder, "me/model", "--dry-run", tmp_path / "out", "--license", "mit")
    assert (code, err) == (0, "") and not hub.repos
    files = contents_of(tmp_path / "out")
    assert len(checked) == 1 and "-I" in checked[0]
    for name in files:
        assert f"{name}  " in out
    assert "left out: .env, ema.json, notes.py, optimizer.pt, recipe.yaml" in out
    assert not any(name in files for name in JUNK) and {"README.md", "manifest.json"} < files.keys()
    assert not any("HF_TOKEN" in content.decode("latin-1") for content in files.values())
    code, out, err = bd3lm("push", run_folder, "me/model", "--license", "mit")
    assert (code, err) == (0, "")
    uploaded = {name: data for name, data in hub.repos["me/model"]["main"].items() if name != ".gitattributes"}
    assert uploaded == files
    assert f"uploaded {len(files)} files: https://hub/me/model/commit/1" in out
    assert "hf_secret" not in out


def test_a_second_push_says_that_there_is_nothing_to_do(bd3lm, run_folder, hub, checked):
    assert bd3lm("push", run_folder, "me/model")[0] == 0
    code, out, _ = bd3lm("push", run_folder, "me/model")
    assert code == 0 and out.endswith("nothing to do: me/model holds these files already\n")
    assert len(hub.commits) == 1


def test_options_reach_the_commit(bd3lm, run_folder, hub, checked):
    options = ("--private", "--revision", "v1", "--message", "Hello", "--max-shard-size", "20KB")
    code, out, _ = bd3lm("push", run_folder, "me/model", *options)
    assert code == 0 and hub.private["me/model"] is True
    assert (hub.commits[0].commit_message, hub.commits[0].revision) == ("Hello", "v1")
    assert "model.safetensors.index.json" in hub.repos["me/model"]["v1"] and "model-00001-of-" in out
    code, out, _ = bd3lm("push", run_folder, "me/model", "--create-pr")
    assert code == 0 and "https://hub/me/model/discussions/1" in out
    assert hub.commits[1].commit_message == "Upload model"


def test_an_adapter_names_the_repository_of_its_base(bd3lm, model_folder, tmp_path, hub, checked):
    folder = make_adapter(model_folder, tmp_path / "adapter")
    code, _, err = bd3lm("push", folder, "me/adapter")
    assert code == 2 and "name its repository with --base-model" in err
    assert bd3lm("push", folder, "me/adapter", "--base-model", "me/base")[0] == 0
    files = hub.repos["me/adapter"]["main"]
    assert b'"base_model_name_or_path": "me/base"' in files["adapter_config.json"]
    assert str(model_folder).encode() not in b"".join(files.values())
    assert "model.safetensors" not in files and ModelCard(files["README.md"].decode()).data.base_model == "me/base"


def test_a_folder_that_fails_the_check_is_not_uploaded(bd3lm, run_folder, hub, monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: AutoModel computes something else\n")
    monkeypatch.setattr(load_check.subprocess, "run", lambda *a, **k: failed)
    code, out, err = bd3lm("push", run_folder, "me/model")
    assert (code, out) == (1, "") and not hub.repos
    text = "does not load by itself, so nothing is uploaded: RuntimeError: AutoModel computes something else\n"
    assert err == f"error: the folder {text}"
    assert bd3lm("push", run_folder, "me/model", "--dry-run", tmp_path / "out")[0] == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / ".incomplete").exists()


def test_a_failure_of_the_hub_is_no_bad_input(bd3lm, run_folder, hub, checked):
    hub.fail = hub_failure(503, "out of order")
    code, out, err = bd3lm("push", run_folder, "me/model")
    assert (code, out) == (1, "") and err.startswith("error: me/model can not be written: ")
    assert set(hub.repos["me/model"]["main"]) == {".gitattributes"}
    hub.fail = None
    assert bd3lm("push", run_folder, "me/model")[0] == 0


def test_the_temporary_tree_is_removed_whatever_happens(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    hub = MemoryHub()
    push(run_folder, "me/model", api=hub, check=no_check)
    hub.repos.clear()
    hub.fail = hub_failure(503, "out of order")
    with pytest.raises(OSError, match="out of order"):
        push(run_folder, "me/model", api=hub, check=no_check)
    job, _ = push(run_folder, "me/model", api=hub, check=no_check, background=True)
    assert "out of order" in str(job.exception())

    def refuse(folder, model):
        raise CheckError("no")

    with pytest.raises(CheckError):
        push(run_folder, "me/model", api=hub, check=refuse)
    assert not any((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("repo", "part"),
    [("model", "has no owner: write owner/model"), ("me/my model", "is no name of a repository"), ("a/b/c", "is no")],
)
def test_an_invalid_name_is_told_before_the_folder_is_looked_at(bd3lm, repo, part):
    code, _, err = bd3lm("push", "./nowhere", repo)
    assert code == 2 and part in err


def test_without_a_login_nothing_is_begun(bd3lm, run_folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(push_module, "write_tree", lambda *a, **k: pytest.fail("work was done"))
    code, _, err = bd3lm("push", run_folder, "me/model")
    assert (code, err) == (2, "error: nobody is logged in here: run `hf auth login`, or set HF_TOKEN.\n")


def test_a_dry_run_needs_no_login(run_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    tree = dry_run(run_folder, "me/model", tmp_path / "out", check=no_check)
    assert tree.sizes == {name: len(data) for name, data in contents_of(tmp_path / "out").items()}
    assert all(kind_of(name) for name in tree.sizes)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--message", " "), "--message is empty"),
        (("--max-shard-size", "big"), "'big' is no size: write 5GB"),
        (("--weights", "ema"), "--weights ema: "),
        (("--base-model", "me/base"), "is no adapter"),
    ],
)
def test_bad_options_are_told(bd3lm, run_folder, hub, arguments, part):
    code, _, err = bd3lm("push", run_folder, "me/model", *arguments)
    assert code == 2 and part in err and not hub.repos


def test_a_token_on_the_command_line_is_refused_without_being_shown(bd3lm, run_folder, hub):
    code, out, err = bd3lm("push", run_folder, "me/model", "--token", "hf_secret")
    assert code == 2 and "a token is not for the command line" in err
    assert "hf_secret" not in out + err and not hub.repos


def test_a_missing_tokenizer_is_told_and_may_be_meant(bd3lm, model_folder, hub, checked):
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    code, _, err = bd3lm("push", model_folder, "me/model")
    assert code == 2 and "pass --no-tokenizer" in err and not hub.repos
    assert bd3lm("push", model_folder, "me/model", "--no-tokenizer")[0] == 0
    assert "tokenizer.json" not in hub.repos["me/model"]["main"]


def test_a_target_in_use_is_not_written_to(bd3lm, run_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    code, _, err = bd3lm("push", run_folder, "me/model", "--dry-run", tmp_path / "out")
    assert code == 2 and "out is in use" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_small_disk_is_told_before_anything_is_written(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(push_module, "free_bytes", lambda folder: 1000)
    with pytest.raises(ValueError, match=r"the tree takes about .* kB, but only 1.0 kB are free.* set TMPDIR"):
        write_tree(run_folder, tmp_path / "out", "me/model", check=no_check)
    assert not (tmp_path / "out").exists()
