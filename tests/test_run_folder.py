import errno
import os
import shutil

import pytest
from safetensors import SafetensorError

from bd3lm_hf.run_folder import (
    COMPLETE_NAME,
    RECIPE_HEADER,
    RECIPE_NAME,
    STAGING_NAME,
    SaveError,
    as_size,
    check_output_dir,
    checkpoints,
    clear_output_dir,
    incomplete_because,
    last_complete_checkpoint,
    lock_output_dir,
    mark_complete,
    publish_files,
    publish_folder,
    read_completion_mark,
    recover_output_dir,
    remove_old_checkpoints,
    saving,
)


def test_a_folder_is_replaced_in_one_step(tmp_path):
    for name, text in (("staged/checkpoint-1", "new"), ("checkpoint-1", "old")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(text)
    publish_folder(tmp_path / "staged" / "checkpoint-1", tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "new"
    assert list((tmp_path / "staged").iterdir()) == []


def test_published_files_leave_others_alone_and_get_the_permissions_of_new_files(tmp_path):
    (tmp_path / "staged" / "sub").mkdir(parents=True)
    (tmp_path / "staged" / "sub" / "a").write_text("new")
    (tmp_path / "staged" / "model.safetensors").touch(mode=0o600)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "b").write_text("other")
    publish_files(tmp_path / "staged", tmp_path / "target")
    assert (tmp_path / "target" / "sub" / "a").read_text() == "new"
    assert (tmp_path / "target" / "b").read_text() == "other"
    mode = (tmp_path / "target" / "b").stat().st_mode
    assert (tmp_path / "target" / "model.safetensors").stat().st_mode == mode
    assert not (tmp_path / "staged").exists()


def test_a_new_or_empty_folder_is_free_and_a_file_or_a_foreign_folder_is_refused_without_overwrite(tmp_path):
    check_output_dir(tmp_path / "new")
    check_output_dir(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"recipe\.yaml is missing.*--overwrite_output_dir"):
        check_output_dir(tmp_path)
    check_output_dir(tmp_path, overwrite=True)
    clear_output_dir(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"
    with pytest.raises(ValueError, match="is a file: name a folder"):
        check_output_dir(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("leave", "message"),
    [
        (lambda folder: (folder / "model.safetensors").touch(), "--overwrite_output_dir"),
        (lambda folder: (folder / "checkpoint-7").mkdir(), "checkpoint-7: .*--resume_from_checkpoint true"),
    ],
)
def test_the_files_of_an_earlier_run_are_not_lost_by_accident(tmp_path, leave, message):
    (tmp_path / RECIPE_NAME).write_text(RECIPE_HEADER)
    check_output_dir(tmp_path)
    leave(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_output_dir(tmp_path)
    check_output_dir(tmp_path, overwrite=True)
    check_output_dir(tmp_path, resume=True)


def test_only_one_process_trains_into_a_folder(tmp_path):
    folder = tmp_path / "a" / "run"
    with lock_output_dir(folder):
        check_output_dir(folder)  # the lock is not a foreign file
        with pytest.raises(ValueError, match="--output_dir .*run"), lock_output_dir(folder):
            pass
    assert not (tmp_path / "a").exists()
    with lock_output_dir(folder):
        (folder / "file").write_text("")
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_clearing_removes_checkpoints_of_our_runs_only(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / STAGING_NAME).mkdir()
    clear_output_dir(tmp_path)
    assert (tmp_path / "checkpoint-7").is_dir()  # no recipe: not ours
    assert not (tmp_path / STAGING_NAME).exists()
    (tmp_path / RECIPE_NAME).write_text("dataset: python-docs\n")
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        check_output_dir(tmp_path)
    clear_output_dir(tmp_path)
    assert (tmp_path / "checkpoint-7").is_dir()  # the user's own recipe
    (tmp_path / RECIPE_NAME).write_text(RECIPE_HEADER)
    clear_output_dir(tmp_path)
    assert not (tmp_path / "checkpoint-7").exists()


# Complete checkpoints


def make_checkpoint(folder, step, **content):
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "sub").mkdir(parents=True)
    (checkpoint / "weights").write_text("weights")
    (checkpoint / "sub" / "state").write_text("state")
    mark_complete(checkpoint, {"resumable": True, **content})
    return checkpoint


def test_a_marked_checkpoint_is_complete_and_keeps_its_content(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3, seed=5)
    assert incomplete_because(checkpoint) is None
    assert read_completion_mark(checkpoint)["seed"] == 5
    assert read_completion_mark(checkpoint)["files"] == {"weights": 7, "sub/state": 5}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
        (lambda folder: (folder / COMPLETE_NAME).unlink(), "it has no run.json, which is written last"),
        (lambda folder: (folder / COMPLETE_NAME).write_text('{"files'), "its run.json is damaged"),
        (lambda folder: (folder / COMPLETE_NAME).write_text("[]"), "its run.json is damaged"),
        (lambda folder: (folder / COMPLETE_NAME).write_text('{"files": []}'), "its run.json is damaged"),
        (lambda folder: (folder / "sub" / "state").unlink(), "sub/state is missing"),
        (lambda folder: (folder / "weights").write_text("w" * 1234), "weights has 1,234 bytes instead of 7"),
    ],
)
def test_a_checkpoint_with_missing_data_is_not_complete(tmp_path, damage, reason):
    earlier, checkpoint = make_checkpoint(tmp_path, 3), make_checkpoint(tmp_path, 12)
    damage(checkpoint)
    assert incomplete_because(checkpoint) == reason
    with pytest.raises(ValueError, match=f"checkpoint-12.*: {reason}"):
        read_completion_mark(checkpoint)
    assert last_complete_checkpoint(tmp_path) == earlier


def test_checkpoints_are_ordered_by_step(tmp_path):
    for step in (9, 12, 3):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-9", "checkpoint-12"]
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-12"
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_with_the_model_only_is_not_resumed(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3, resumable=False)
    with pytest.raises(ValueError, match="saved with --save_only_model.*--init_from"):
        read_completion_mark(checkpoint)


class Killed(BaseException):
    """Simulates a SIGKILL."""


@pytest.fixture
def versions(tmp_path):
    """A checkpoint, and the one that is to replace it."""
    return make_checkpoint(tmp_path, 3, version="old"), make_checkpoint(tmp_path / STAGING_NAME, 3, version="new")


def test_a_checkpoint_is_restored_after_a_kill_between_two_renames(versions, tmp_path, monkeypatch):
    old, new = versions
    rename, calls = os.rename, []

    def rename_once(source, target):
        if calls:
            raise Killed
        calls.append(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(Killed):
        publish_folder(new, old)
    monkeypatch.undo()
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / RECIPE_NAME).write_text(RECIPE_HEADER)
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        check_output_dir(tmp_path)
    recover_output_dir(tmp_path)
    assert read_completion_mark(old)["version"] == "old"


def test_a_failure_between_two_renames_keeps_the_old_checkpoint(versions, tmp_path, monkeypatch):
    (old, new), rename = versions, os.rename

    def fail_for_the_new(source, target):
        if source == new:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_new)
    with pytest.raises(SaveError, match="Input/output error.*checkpoint-3"), saving("it", tmp_path):
        publish_folder(new, old)
    assert read_completion_mark(old)["version"] == "old"
    assert not (tmp_path / STAGING_NAME).exists()


def test_a_replaced_checkpoint_does_not_come_back(versions, tmp_path, monkeypatch):
    old, new = versions
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **keywords: None)  # killed before the old one is removed
    publish_folder(new, old)
    recover_output_dir(tmp_path)
    assert read_completion_mark(old)["version"] == "new"


def test_a_kill_while_a_model_is_published_leaves_no_weights_rather_than_old_ones(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, text in ((source, "new"), (target, "old")):
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "training_args.bin", "vocab.json"):
            (folder / name).write_text(text)
    (target / "model-00001-of-00002.safetensors").write_text("old")
    (target / "notes.bin").write_text("foreign")
    replace, states = os.replace, []

    def replace_and_look(source, destination):
        replace(source, destination)
        states.append({path.name: path.read_text() for path in target.iterdir() if path.name.startswith("model")})

    monkeypatch.setattr(os, "replace", replace_and_look)
    publish_files(source, target)
    assert states == [{}, {}, {}, {"model.safetensors": "new"}]
    assert (target / "config.json").read_text() == "new"
    assert (target / "notes.bin").read_text() == "foreign"


def test_old_checkpoints_are_renamed_before_they_are_deleted(tmp_path, monkeypatch):
    for step in (3, 6, 9, 12):
        make_checkpoint(tmp_path, step)
    rmtree, names = shutil.rmtree, []

    def look_and_remove(path, **keywords):
        names.append(sorted(other.name for other in tmp_path.glob("checkpoint-*")))
        rmtree(path, **keywords)

    monkeypatch.setattr(shutil, "rmtree", look_and_remove)
    keep = {str(tmp_path / "checkpoint-3"), str(tmp_path / "checkpoint-12")}
    remove_old_checkpoints(tmp_path, limit=2, keep=keep)
    assert names == [["checkpoint-12", "checkpoint-3", "checkpoint-9"], ["checkpoint-12", "checkpoint-3"]]
    remove_old_checkpoints(tmp_path, limit=None, keep=set())
    assert len(checkpoints(tmp_path)) == 2


# Disk


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("writer"), SafetensorError("File too large (os error 27)")]
)
def test_a_failure_to_save_is_one_clear_error_and_leaves_no_debris(tmp_path, error):
    make_checkpoint(tmp_path, 3)
    (tmp_path / STAGING_NAME / "checkpoint-6").mkdir(parents=True)
    message = f"checkpoint-6.*{type(error).__name__}.*checkpoint-3.*--resume_from_checkpoint true"
    with pytest.raises(SaveError, match=message), saving("checkpoint-6", tmp_path):
        raise error
    assert not (tmp_path / STAGING_NAME).exists()


def test_other_errors_pass_through_saving(tmp_path):
    with pytest.raises(KeyError), saving("checkpoint-6", tmp_path):
        raise KeyError


def test_sizes_are_written_for_people():
    assert [as_size(size) for size in (12, 1234, 5e6, 7.25e9)] == ["12 bytes", "1.2 kB", "5.0 MB", "7.2 GB"]
