"""Checkpoints are loaded whole or refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3lm_hf.checkpoints import NotFiniteError, check_finite_weights, load_model, read_config


def test_a_saved_model_comes_back_with_its_weights(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    for (name, mine), other in zip(tiny_model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


def test_the_configuration_may_be_another_one(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    config = read_config(str(tmp_path))
    assert config.block_size == 4
    config.block_size = 8
    assert load_model(str(tmp_path), config=config).config.block_size == 8


def test_an_interval_that_the_weights_lack_comes_from_the_configuration(tiny_model, tmp_path):
    tiny_model.set_interval(0.3, 0.8)
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["sampling_eps_min"], weights["sampling_eps_max"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(tmp_path)).interval() == pytest.approx((0.3, 0.8))


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--init_from ./nowhere: there is no such folder"):
        load_model("./nowhere", argument="--init_from")


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_listed(tiny_model, tmp_path, damage):
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = "backbone.blocks.0.attn_out.weight"
    if damage == "missing":
        del weights[key]
    elif damage == "unexpected":
        key = "backbone.blocks.9.attn_out.weight"
        weights[key] = torch.zeros(2, 2)
    else:
        weights[key] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"has 1 {damage} weights \({key}"):
        load_model(str(tmp_path))


def test_truncated_weights_are_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded; name a complete checkpoint: SafetensorError"):
        load_model(str(tmp_path))


def test_weights_that_are_a_pointer_of_git_lfs_are_named(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    )
    with pytest.raises(ValueError, match=r"model\.safetensors is a pointer of Git LFS.*git lfs pull"):
        load_model(str(tmp_path))


def test_weights_that_are_not_finite_are_named(tiny_model):
    with torch.no_grad():
        tiny_model.get_output_embeddings().bias[1:3] = float("nan")
    with pytest.raises(NotFiniteError, match=r"2 of \d+ numbers of backbone.output_layer.linear.bias in here are NaN"):
        check_finite_weights(tiny_model, "here")
