"""The hub of the tests speaks with the real client: what goes up comes down bit for bit."""

import hashlib
import warnings
from pathlib import Path

import pytest
from hub_server import TOKEN, USER, Fault
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


REPO = f"{USER}/model"
FILES = {
    "config.json": b'{"model_type": "bd3lm"}',
    "model.safetensors": bytes(range(256)) * 40,
    "sub/folder/words.txt": "naïve\n".encode(),
    "empty.txt": b"",
}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(content)
    return tmp_path / "up"


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi()


@pytest.fixture
def filled(hub, api, folder):
    """The repository with `FILES` in it."""
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="First")
    return hub.repos[REPO]


def download(api, tmp_path, **options) -> dict[str, bytes]:
    place = tmp_path / "down"
    found = api.snapshot_download(REPO, local_dir=place, **options)
    paths = [path for path in place.rglob("*") if path.is_file() and ".cache" not in path.parts]
    assert str(place) == found
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in paths}


def test_what_goes_up_comes_down_bit_for_bit(hub, api, filled, tmp_path):
    assert api.whoami()["name"] == USER
    assert filled.files() == {**FILES, ".gitattributes": filled.files()[".gitattributes"]}
    assert {name for name, blob in filled.at("main").files.items() if blob.large} == {"model.safetensors"}
    assert download(api, tmp_path) == filled.files()
    path = api.hf_hub_download(REPO, "model.safetensors")
    assert Path(path).read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize("part_size", [1000, 10240])
def test_large_files_go_in_parts(hub, api, folder, part_size):
    hub.part_size = part_size
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.repos[REPO].files()["model.safetensors"] == FILES["model.safetensors"]
    assert len(hub.asked("PUT", "/lfs/[0-9a-f]+/[0-9]+")) == -(-10240 // part_size)


def test_the_listing_names_every_file_with_size_and_hash(api, filled):
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == filled.branches["main"] and not info.private
    entries = {entry.rfilename: entry for entry in info.siblings}
    assert entries.keys() == FILES.keys() | {".gitattributes"}
    weights = FILES["model.safetensors"]
    assert entries["model.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    content = FILES["config.json"]
    assert entries["config.json"].blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    assert entries["config.json"].lfs is None and entries["config.json"].size == len(content)
    tree = {entry.path: type(entry).__name__ for entry in api.list_repo_tree(REPO)}
    assert tree["sub"] == "RepoFolder" and "sub/folder" not in tree
    assert {entry.path for entry in api.list_repo_tree(REPO, recursive=True)} == {
        *FILES,
        ".gitattributes",
        "sub",
        "sub/folder",
    }
    assert [entry.path for entry in api.list_repo_tree(REPO, "sub/folder")] == ["sub/folder/words.txt"]
    assert [entry.size for entry in api.get_paths_info(REPO, ["model.safetensors", "nothing"])] == [len(weights)]
    assert sorted(api.list_repo_files(REPO)) == sorted(entries)
    assert api.file_exists(REPO, "config.json") and not api.file_exists(REPO, "nothing")
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["First", "initial commit"]


def test_what_is_there_is_not_sent_again(hub, api, filled, folder):
    before = filled.branches["main"]
    (folder / "copy.safetensors").write_bytes(FILES["model.safetensors"])
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert filled.branches["main"] != before and filled.files()["copy.safetensors"] == FILES["model.safetensors"]
    assert len(hub.asked("PUT", "/lfs/")) == 1


def test_a_repository_is_made_once(hub, api):
    assert api.create_repo(REPO, private=True).repo_id == REPO
    assert hub.repos[REPO].private
    api.create_repo(REPO, exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    api.delete_repo(REPO)
    assert not hub.repos and not api.repo_exists(REPO)


def test_branches_tags_and_pull_requests_leave_main_alone(hub, api, filled):
    main = filled.branches["main"]
    api.create_branch(REPO, branch="feature/x")
    add = [CommitOperationAdd("new.txt", b"new")]
    api.create_commit(REPO, add, commit_message="On a branch", revision="feature/x")
    done = api.create_commit(REPO, [CommitOperationAdd("new.txt", b"pr")], commit_message="Pull", create_pr=True)
    api.create_tag(REPO, tag="v1")
    assert filled.branches["main"] == main and "new.txt" not in filled.files()
    assert filled.files("feature/x")["new.txt"] == b"new"
    assert done.pr_revision == "refs/pr/1" and filled.files("refs/pr/1")["new.txt"] == b"pr"
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "feature/x"} and refs.tags[0].target_commit == main
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    for revision, content in {"feature/x": b"new", "refs/pr/1": b"pr"}.items():
        assert Path(api.hf_hub_download(REPO, "new.txt", revision=revision)).read_bytes() == content


def test_a_commit_is_all_or_nothing(hub, api, filled):
    before = filled.branches["main"]
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("nothing.txt")]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, operations, commit_message="Half")
    with pytest.raises(HfHubHTTPError, match="412"):
        parent = filled.at("main").parent
        api.create_commit(REPO, operations[:1], commit_message="Late", parent_commit=parent)
    assert filled.branches["main"] == before
    api.create_commit(REPO, [CommitOperationDelete("sub/")], commit_message="Less", parent_commit=before)
    assert "sub/folder/words.txt" not in filled.files()


def test_a_card_is_checked_before_anything_is_sent(hub, api, filled):
    before = filled.branches["main"]
    bad = CommitOperationAdd("README.md", b"---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.create_commit(REPO, [bad], commit_message="Card")
    assert filled.branches["main"] == before
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        api.create_commit(REPO, [CommitOperationAdd("README.md", b"# Words")], commit_message="Card")
    assert "empty or missing yaml metadata" in str(caught[0].message)


def test_what_is_private_is_not_there_for_strangers(hub, api, filled):
    stranger = HfApi(token=False)
    assert stranger.model_info(REPO).id == REPO
    filled.private = True
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info(REPO)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.create_repo("else/where")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="nowhere")


def test_the_record_holds_no_token_and_the_other_host_never_gets_it(hub, api, filled):
    api.hf_hub_download(REPO, "model.safetensors")
    assert not hub.holds(TOKEN)
    assert hub.asked("POST", "/commit/main")[0].headers["authorization"] == "Bearer ***"
    for request in [*hub.asked("PUT", "^/lfs/"), *hub.asked("GET", "^/cdn/")]:
        assert request.headers["host"].startswith("localhost:") and "authorization" not in request.headers
    hub.repos[REPO].commit("main", [{"value": {"summary": TOKEN}}], {}, False)
    assert hub.holds(TOKEN)


def test_a_range_is_a_part_of_the_file(hub, filled):
    url = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors"
    part = get_session().get(url, headers={"Range": "bytes=5-9"})
    assert part.status_code == 206 and part.content == FILES["model.safetensors"][5:10]
    assert part.headers["content-range"] == "bytes 5-9/10240"


def test_a_fault_strikes_as_often_as_it_says(hub, api, filled):
    hub.faults.append(Fault("GET", "/refs$", times=1, skip=1, status=403, message="not today"))
    api.list_repo_refs(REPO)
    with pytest.raises(HfHubHTTPError, match="not today"):
        api.list_repo_refs(REPO)
    api.list_repo_refs(REPO)
    assert [request.status for request in hub.asked("GET", "/refs$")] == [200, 403, 200]
