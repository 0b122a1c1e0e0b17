"""Checkpoints are loaded whole or refused."""

import pytest
from safetensors.torch import load_file, save_file

from bd3lm_hf.checkpoints import load_model, read_config


def test_the_configuration_can_be_overridden(tiny_model, tmp_path):
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


def test_weights_that_are_a_pointer_of_git_lfs_are_named(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"model\.safetensors is a pointer of Git LFS.*git lfs pull"):
        load_model(str(tmp_path))
