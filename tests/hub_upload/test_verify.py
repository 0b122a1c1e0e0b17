"""`bd3lm verify` exits with 0 for a folder as it was pushed, 1 for one that differs, 2 without a manifest."""

import hashlib
import json

import pytest
from test_cli import assert_refused

import bd3lm_hf
from bd3lm_hf.hub_upload.repo_files import MANIFEST_NAME, files_of, read_manifest, write_manifest


@pytest.fixture
def folder(model_folder):
    (model_folder / "README.md").write_text("# A card")
    write_manifest(model_folder)
    return model_folder


def change_manifest(folder, **fields):
    content = {**read_manifest(folder), **fields}
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def test_every_file_but_the_card_is_listed_with_its_size_and_hash(folder):
    content = read_manifest(folder)
    assert content["bd3lm_hf"] == bd3lm_hf.__version__
    assert content["files"].keys() == files_of(folder).keys() - {"README.md", MANIFEST_NAME}
    data = (folder / "model.safetensors").read_bytes()
    assert content["files"]["model.safetensors"] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_folder_is_intact_whatever_happens_to_its_card_and_the_clients_files(bd3lm, folder):
    (folder / "README.md").write_text("# Another card")
    (folder / ".gitattributes").write_text("")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hub.json").write_text("")
    code, out, err = bd3lm("verify", folder, "--strict")
    assert (code, err) == (0, "")
    assert out.startswith(f"intact: {len(files_of(folder)) - 4} files")
    assert f"code: that of bd3lm_hf {bd3lm_hf.__version__}\n" in out


def test_missing_changed_and_extra_files_are_named(bd3lm, folder):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # of the same size
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "noise_bd3lm.py").write_text("")
    (folder / "tokenizer.json").unlink()
    (folder / "more.py").write_text("")
    (folder / ".hidden.py").write_text("")
    code, out, _ = bd3lm("verify", folder)
    *files, state, code_line = out.splitlines()
    assert code == 1 and state.startswith("NOT INTACT: ")
    assert files == [
        "missing: tokenizer.json",
        "changed: model.safetensors",
        "changed: noise_bd3lm.py",
        "extra: .hidden.py",
        "extra: more.py",
    ]
    assert f"differs from bd3lm_hf {bd3lm_hf.__version__} in .hidden.py, more.py, noise_bd3lm.py" in code_line


def test_other_code_under_a_manifest_of_its_own_is_named_and_fails_when_strict(bd3lm, folder):
    (folder / "noise_bd3lm.py").write_text("# changed")
    write_manifest(folder)
    code, out, _ = bd3lm("verify", folder)
    assert code == 0 and "differs" in out and "noise_bd3lm.py" in out
    assert bd3lm("verify", folder, "--strict")[0] == 1


def test_a_manifest_cannot_steer_the_terminal(bd3lm, folder):
    change_manifest(folder, bd3lm_hf="\x1b[2K\rintact: 9 files")
    (folder / "model.safetensors").unlink()
    code, out, _ = bd3lm("verify", folder)
    assert code == 1 and "\x1b" not in out and "\r" not in out and "\\x1b[2K" in out


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"bd3lm_hf": 1, "files": [1]}', "[" * 100_000, "\xff"],
    ids=lambda text: text[:12],
)
def test_a_damaged_manifest_is_refused_in_one_line(bd3lm, folder, text):
    (folder / MANIFEST_NAME).write_text(text, encoding="latin-1")
    assert_refused(bd3lm("verify", folder), MANIFEST_NAME)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["EMPTY"], MANIFEST_NAME), (["./nowhere"], "./nowhere"), (["FOLDER", "--revision", "v1"], "--revision v1")],
)
def test_there_must_be_something_to_verify(bd3lm, folder, tmp_path, arguments, part):
    places = {"EMPTY": tmp_path, "FOLDER": folder}
    assert_refused(bd3lm("verify", *(places.get(word, word) for word in arguments)), part)
