"""The manifest lists what decides the numbers, and a folder beside it is intact or says where it is not."""

import hashlib
import json

import pytest

import bd3lm_hf
from bd3lm_hf.hub_upload.manifest import compare_with_manifest, read_manifest, write_manifest
from bd3lm_hf.hub_upload.repo_files import MANIFEST_NAME, files_of


@pytest.fixture
def folder(model_folder):
    (model_folder / "README.md").write_text("# A card")
    write_manifest(model_folder)
    return model_folder


def test_every_file_but_the_card_is_listed_with_its_size_and_hash(folder):
    content = read_manifest(folder)
    assert content["bd3lm_hf"] == bd3lm_hf.__version__
    assert content["files"].keys() == files_of(folder).keys() - {"README.md", MANIFEST_NAME}
    data = (folder / "model.safetensors").read_bytes()
    expected = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert content["files"]["model.safetensors"] == expected


def test_an_untouched_folder_is_intact_whatever_happens_to_its_card(folder):
    (folder / "README.md").write_text("# Another card")
    (folder / ".gitattributes").write_text("")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hub.json").write_text("")
    found = compare_with_manifest(folder)
    assert found.intact and not found.other_code
    assert found.num_files == len(files_of(folder)) - 4


def test_missing_changed_and_extra_files_are_named(folder):
    (folder / "tokenizer.json").unlink()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # of the same size
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "pytorch_model.bin").write_bytes(b"")
    found = compare_with_manifest(folder)
    assert not found.intact
    assert (found.missing, found.changed, found.extra) == (
        ["tokenizer.json"],
        ["model.safetensors"],
        ["pytorch_model.bin"],
    )


def test_code_of_another_version_is_told_from_damaged_code(folder):
    (folder / "noise_bd3lm.py").write_text("# older")
    (folder / "older_bd3lm.py").write_text("# gone since")
    write_manifest(folder)
    found = compare_with_manifest(folder)
    assert found.intact and found.other_code == ["noise_bd3lm.py", "older_bd3lm.py"]


def test_a_folder_without_manifest_can_not_be_compared(model_folder):
    with pytest.raises(ValueError, match=r"holds no manifest.json: only folders that `bd3lm push` wrote"):
        compare_with_manifest(model_folder)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../b", "..\\other"])
def test_a_manifest_does_not_lead_out_of_its_folder(folder, name):
    content = read_manifest(folder)
    content["files"][name] = {"size": 1, "sha256": ""}
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest.json is damaged .*no file of the folder"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"bd3lm_hf": "1", "files": {"a": {}}}', '{"files": {}}'])
def test_a_damaged_manifest_is_refused(folder, text):
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        read_manifest(folder)
