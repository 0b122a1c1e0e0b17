"""A repository contains exactly what a model needs; folders that cannot be shared are refused by their file names."""

import json
import os
import shutil
import stat

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from shared_models import JUNK, add_run, make_adapter

from bd3lm_hf.hub_upload.repo_files import (
    CODE,
    check_source,
    files_of,
    is_allowed,
    left_out,
    name_base,
    new_folder,
    read_contents,
    write_contents,
)
from bd3lm_hf.run_folder import mark_complete


@pytest.fixture
def written(tmp_path):
    """A function `(folder, **options of read_contents) -> (folder of the repository's files, contents)`."""

    def write(folder, **options):
        contents = read_contents(folder, **options)
        write_contents(contents, folder, tmp_path / "files")
        return tmp_path / "files", contents

    return write


@pytest.fixture
def adapter_folder(model_folder, tmp_path):
    return make_adapter(model_folder, tmp_path / "adapter")


def test_the_files_of_a_run_are_the_model_and_nothing_else_and_always_the_same(model_folder, written):
    folder, _ = written(add_run(model_folder))
    content = {name: path.read_bytes() for name, path in files_of(folder).items()}
    code = {path.name for path in model_folder.glob("*.py")} - set(JUNK)
    others = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert content.keys() == code | others
    assert all(content[name] == (CODE / name).read_bytes() for name in code)
    assert str(model_folder).encode() not in b"".join(content.values())
    assert b"hf_secret" not in b"".join(content.values())
    junk = {f"{name.split('/')[0]}/" if "/" in name else name for name in JUNK}
    assert set(left_out(model_folder, folder)) == junk | {"recipe.yaml", "results.json", "weights.json"}
    shutil.rmtree(folder)
    again, _ = written(model_folder)
    assert {name: path.read_bytes() for name, path in files_of(again).items()} == content


@pytest.mark.parametrize(("weights", "shift"), [("auto", 1.0), ("ema", 1.0), ("raw", 0.0)])
def test_the_average_of_a_checkpoint_is_taken_unless_raw_weights_are_requested(model_folder, written, weights, shift):
    raw = load_file(model_folder / "model.safetensors")
    average = {name: t + 1.0 for name, t in raw.items() if "sampling_eps" not in name and "inv_freq" not in name}
    save_file(average, model_folder / "ema.safetensors", metadata={"decay": "0.9"})
    folder, contents = written(model_folder, weights=weights)
    saved = load_file(folder / "model.safetensors")
    name = "backbone.vocab_embed.embedding"
    torch.testing.assert_close(saved[name], raw[name] + shift)
    assert torch.equal(saved["sampling_eps_min"], raw["sampling_eps_min"])
    assert contents.decay == (0.9 if shift else None)
    assert "ema.safetensors" in contents.notes[0] and not (folder / "ema.safetensors").exists()


def test_an_average_that_is_missing_damaged_or_of_another_model_is_refused(model_folder):
    with pytest.raises(ValueError, match=r"--weights ema: .*ema.safetensors"):
        read_contents(model_folder, weights="ema")
    save_file({"other": torch.zeros(2)}, model_folder / "ema.safetensors")
    with pytest.raises(ValueError, match=r"other \(2,\).*--weights raw"):
        read_contents(model_folder)
    (model_folder / "ema.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match=r"ema.safetensors .*--weights raw"):
        read_contents(model_folder)


def test_an_adapter_is_shared_as_an_adapter_and_its_base_must_have_a_repository(adapter_folder, model_folder, written):
    folder, contents = written(adapter_folder)
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files_of(folder)) == names
    assert isinstance(contents.model, PeftModel) and contents.base == str(model_folder)
    name_base(folder, "me/base")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    with pytest.raises(ValueError, match=rf"{model_folder}.*--base-model"):
        check_source(adapter_folder)
    check_source(adapter_folder, base_model="me/base")
    with pytest.raises(ValueError, match=f"--base-model {model_folder}"):
        check_source(adapter_folder, base_model=str(model_folder))
    with pytest.raises(ValueError, match="--base-model me/base"):
        check_source(model_folder, base_model="me/base")


def test_a_folder_without_a_model_is_refused_and_its_checkpoint_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        check_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config.json"):
        check_source(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    mark_complete(tmp_path / "checkpoint-3", {"resumable": True})
    with pytest.raises(ValueError, match=r"checkpoint-3"):
        check_source(tmp_path)


def rename_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove_a_file_of_a_checkpoint(folder):
    mark_complete(folder, {"resumable": True})
    (folder / "generation_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (rename_weights, r"pytorch_model.bin.*bd3lm convert"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model.safetensors"),
        (remove_a_file_of_a_checkpoint, "generation_config.json"),
    ],
)
def test_a_folder_that_cannot_be_shared_is_refused(model_folder, damage, part):
    damage(model_folder)
    with pytest.raises(ValueError, match=part):
        check_source(model_folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates", "tokenizer.json", "config.json"])
def test_a_link_out_of_the_folder_is_refused(model_folder, tmp_path, name):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.jinja").write_text("secret")
    (model_folder / name).unlink(missing_ok=True)
    target = "private" if name == "additional_chat_templates" else "private/secret.jinja"
    (model_folder / name).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=name):
        check_source(model_folder)


def test_links_that_no_model_is_read_from_and_those_of_the_hubs_cache_are_allowed(model_folder, tmp_path):
    snapshot, blobs = tmp_path / "models--me--model" / "snapshots" / "abc", tmp_path / "models--me--model" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (model_folder / "latest").symlink_to(tmp_path)
    check_source(model_folder)
    (model_folder / "latest").unlink()
    for path in model_folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    check_source(snapshot)


def test_a_new_folder_appears_when_it_is_complete_with_the_modes_of_the_umask(tmp_path):
    with new_folder(tmp_path / "a" / "out", "DST") as folder:
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
        assert not (tmp_path / "a" / "out").exists() and folder.parent.stat().st_mode & 0o077 == 0
    umask = os.umask(0)
    os.umask(umask)
    mode = stat.S_IMODE((tmp_path / "a" / "out" / "model.safetensors").stat().st_mode)
    assert mode == 0o666 & ~umask and [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_a_new_folder_replaces_nothing_follows_no_link_and_leaves_nothing_behind(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name in ("mine", "link", "file"):
        with pytest.raises(ValueError, match=f"DST .*{name}"), new_folder(tmp_path / name, "DST"):
            raise AssertionError
    with pytest.raises(RuntimeError, match="stop"), new_folder(tmp_path / "out", "DST") as folder:
        (folder / "half").write_text("")
        raise RuntimeError("stop")
    # Something else appears under that name in the meantime.
    with pytest.raises(OSError), new_folder(tmp_path / "late", "DST"):
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "theirs").write_text("")
    shutil.rmtree(tmp_path / "late")
    assert sorted(tmp_path.rglob("*")) == before and (mine / "precious").read_text() == "mine"


def test_only_files_that_a_model_needs_are_allowed():
    allowed = ("model-00001-of-00002.safetensors", "modeling_bd3lm.py", "config.json", "chat_template.jinja")
    assert all(map(is_allowed, (*allowed, "README.md", "manifest.json")))
    secret = ("optimizer.pt", "training_args.bin", ".env", "rng_state.pth", "ema.safetensors", "run.json")
    other = ("events.out", "conftest.py", "sub/modeling_bd3lm.py", "__init__.py", "recipe.yaml", "pytorch_model.bin")
    assert not any(map(is_allowed, (*secret, *other, "sub/config.json")))
