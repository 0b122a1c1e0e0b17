"""An upload is one commit of what differs, or nothing at all."""

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from sharing import MemoryHub, hub_failure

from bd3lm_hf.hub_upload.errors import HubError
from bd3lm_hf.hub_upload.manifest import write_manifest
from bd3lm_hf.hub_upload.upload import upload


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "noise_bd3lm.py", "tokenizer.json"):
        (folder / name).write_text(name)
    write_manifest(folder)
    return folder


@pytest.fixture
def hub(tmp_path):
    hub = MemoryHub()
    hub.folder = tmp_path
    return hub


def names_of(commit, kind=CommitOperationAdd):
    return sorted(op.path_in_repo for op in commit.operations if isinstance(op, kind))


def test_a_new_repository_gets_every_file_in_one_commit(hub, tree):
    done = upload(hub, tree, "me/model", message="First", private=True)
    assert hub.private["me/model"] is True
    assert len(hub.commits) == 1 and hub.commits[0].commit_message == "First"
    assert sorted(done.added) == sorted(path.name for path in tree.iterdir()) == names_of(hub.commits[0])
    assert done.removed == [] and done.url == "https://hub/me/model/commit/1"
    for path in tree.iterdir():
        assert hub.repos["me/model"]["main"][path.name] == path.read_bytes()


def test_a_second_upload_has_nothing_to_do(hub, tree):
    upload(hub, tree, "me/model", message="First")
    done = upload(hub, tree, "me/model", message="Second")
    assert (done.url, done.added, done.removed) == ("https://huggingface.co/me/model", [], [])
    assert len(hub.commits) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_only_what_changed_is_sent(hub, tree, name):
    upload(hub, tree, "me/model", message="First")
    (tree / name).write_text(name.upper())  # of the same size
    assert upload(hub, tree, "me/model", message="Second").added == [name]
    assert names_of(hub.commits[1]) == [name]


def test_weights_of_another_layout_and_code_that_is_gone_are_removed(hub, tree):
    upload(hub, tree, "me/model", message="First")
    others = ("pytorch_model.bin", "app.py", "figure.png", "onnx/model.bin")
    hub.repos["me/model"]["main"] |= dict.fromkeys(others, b"")
    (tree / "model.safetensors").rename(tree / "model-00001-of-00001.safetensors")
    (tree / "model.safetensors.index.json").write_text("{}")
    (tree / "noise_bd3lm.py").rename(tree / "loss_bd3lm.py")
    write_manifest(tree)
    done = upload(hub, tree, "me/model", message="Second")
    assert done.removed == ["model.safetensors", "noise_bd3lm.py", "pytorch_model.bin"]
    assert names_of(hub.commits[1], CommitOperationDelete) == done.removed
    # What others put there stays.
    assert {"app.py", "figure.png", "onnx/model.bin", ".gitattributes"} < hub.repos["me/model"]["main"].keys()


def test_a_foreign_manifest_removes_nothing(hub, tree):
    hub.create_repo("me/model", exist_ok=True)
    hub.repos["me/model"]["main"] |= {"manifest.json": b"[]", "app.py": b""}
    assert upload(hub, tree, "me/model", message="First").removed == []


def test_a_branch_is_made_where_it_is_not_there(hub, tree):
    upload(hub, tree, "me/model", message="First", revision="v2")
    assert "config.json" in hub.repos["me/model"]["v2"]
    assert "config.json" not in hub.repos["me/model"]["main"]


def test_a_pull_request_leaves_the_branch_alone(hub, tree):
    done = upload(hub, tree, "me/model", message="First", create_pr=True)
    assert done.url == "https://hub/me/model/discussions/1"
    assert "config.json" not in hub.repos["me/model"]["main"]


@pytest.mark.parametrize("revision", ["refs/pr/7", "v2"])
def test_a_pull_request_is_made_against_a_branch_that_is_there(hub, tree, revision):
    with pytest.raises(HubError, match="me/model can not be written: there is no such repository or revision"):
        upload(hub, tree, "me/model", message="First", revision=revision, create_pr=revision == "v2")
    assert not hub.commits


def test_a_file_of_another_kind_stops_the_upload_before_it_begins(hub, tree):
    (tree / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"optimizer.pt in .* is never uploaded"):
        upload(hub, tree, "me/model", message="First")
    assert not hub.repos


@pytest.mark.parametrize(
    ("status", "part"),
    [
        (401, "log in with `hf auth login`"),
        (403, "your token may not do that"),
        (409, "the repository was changed meanwhile: push again"),
        (412, "the repository was changed meanwhile: push again"),
        (413, "lower --max-shard-size"),
        (429, "push again later"),
        (503, "try again later: a commit is made whole or not at all"),
    ],
)
def test_a_failure_of_the_hub_is_one_line_and_changes_nothing(hub, tree, monkeypatch, status, part):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.create_repo("me/model", exist_ok=True)
    before = dict(hub.repos["me/model"]["main"])
    hub.fail = hub_failure(status, "refused\nBearer hf_secret")
    with pytest.raises(HubError, match=part) as caught:
        upload(hub, tree, "me/model", message="First")
    assert "hf_secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("me/model can not be written: ")
    assert hub.repos["me/model"]["main"] == before


def test_a_broken_connection_is_told_by_its_cause(hub, tree):
    failure = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    failure.__cause__ = ConnectionError("connection reset")
    hub.fail = failure
    with pytest.raises(HubError, match=r"try again later.*\(ConnectionError: connection reset\)"):
        upload(hub, tree, "me/model", message="First")
