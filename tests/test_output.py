import pytest

from bd3lm_hf.training.output import (
    RECIPE_NAME,
    STAGING_NAME,
    check_output_dir,
    clear_output_dir,
    publish_files,
    publish_folder,
)


def test_a_folder_is_replaced_in_one_step(tmp_path):
    for name, text in (("staged/checkpoint-1", "new"), ("checkpoint-1", "old")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(text)
    publish_folder(tmp_path / "staged" / "checkpoint-1", tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "new"
    assert list((tmp_path / "staged").iterdir()) == []


def test_published_files_leave_the_others(tmp_path):
    (tmp_path / "staged" / "sub").mkdir(parents=True)
    (tmp_path / "staged" / "sub" / "a").write_text("new")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "b").write_text("other")
    publish_files(tmp_path / "staged", tmp_path / "target")
    assert (tmp_path / "target" / "sub" / "a").read_text() == "new"
    assert (tmp_path / "target" / "b").read_text() == "other"
    assert not (tmp_path / "staged").exists()


def test_a_new_or_empty_folder_is_free(tmp_path):
    check_output_dir(tmp_path / "new")
    check_output_dir(tmp_path)


def test_a_foreign_folder_is_refused_unless_asked_for(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty and is no folder of an earlier run.*--overwrite_output_dir"):
        check_output_dir(tmp_path)
    check_output_dir(tmp_path, overwrite=True)
    clear_output_dir(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        check_output_dir(tmp_path / "file")


def test_checkpoints_of_an_earlier_run_are_not_lost_by_accident(tmp_path):
    (tmp_path / RECIPE_NAME).write_text("")
    check_output_dir(tmp_path)
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-7: continue it with --resume_from_checkpoint true"):
        check_output_dir(tmp_path)
    check_output_dir(tmp_path, resume=True)
    check_output_dir(tmp_path, overwrite=True)


def test_clearing_removes_checkpoints_of_our_runs_only(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / STAGING_NAME).mkdir()
    clear_output_dir(tmp_path)
    assert (tmp_path / "checkpoint-7").is_dir()  # no recipe: not ours
    assert not (tmp_path / STAGING_NAME).exists()
    (tmp_path / RECIPE_NAME).write_text("")
    clear_output_dir(tmp_path)
    assert not (tmp_path / "checkpoint-7").exists()
