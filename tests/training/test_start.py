"""A checkpoint goes on at another block size: all weights, a new interval, nothing silently left out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.training.initial_model import check_shape, start_from


BUFFERS = {"sampling_eps_min", "sampling_eps_max"}


@pytest.fixture
def checkpoint(tiny_tokenizer, randomize, tmp_path):
    """A function that saves a checkpoint for the tiny tokenizer as other programs write it, and returns its folder."""

    def save(*, without=(), **fields) -> str:
        settings = {"hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2, "dropout": 0.0, "model_length": 32}
        settings |= {"vocab_size": len(tiny_tokenizer), "mask_token_id": tiny_tokenizer.mask_token_id, **fields}
        model = randomize(BD3LMForMaskedLM(BD3LMConfig(**settings)))
        weights = {key: value for key, value in model.state_dict().items() if key not in without}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        foreign = {"model_type": "bd3lm", "return_dict": False, "attn_backend": "sdpa", "torch_dtype": "float32"}
        (tmp_path / "config.json").write_text(json.dumps(settings | foreign))
        return str(tmp_path)

    return save


FULL_DIFFUSION = {
    "published": ({"cross_attn": False, "var_min": False}, ()),
    "buffers named by the config and missing": ({"cross_attn": False, "sampling_eps_max": 0.999}, BUFFERS),
    "with buffers": ({"cross_attn": False}, ()),
    "with a clean stream": ({}, ()),
    "without adaln": ({"cross_attn": False, "adaln": False, "var_min": False}, ()),
}


@pytest.mark.parametrize("case", FULL_DIFFUSION)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_full_diffusion_continues_in_blocks_with_every_weight(checkpoint, tiny_tokenizer, case, block_size):
    fields, without = FULL_DIFFUSION[case]
    folder = checkpoint(block_size=32, without=without, **fields)
    model = start_from(folder, tiny_tokenizer, {"block_size": block_size})
    assert (model.config.block_size, model.config.cross_attn, model.config.var_min) == (block_size, True, True)
    assert model.interval() == pytest.approx((1e-3, 1.0))
    assert model.config.sampling_eps_max == 1.0
    saved = {key: value for key, value in load_file(f"{folder}/model.safetensors").items() if key not in BUFFERS}
    state = model.state_dict()
    assert set(state) == set(saved) | BUFFERS
    for key, value in saved.items():
        assert torch.equal(state[key], value), key
    ids = torch.randint(4, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_full_diffusion_continued_as_such_is_unchanged(checkpoint, tiny_tokenizer):
    folder = checkpoint(block_size=32, cross_attn=False, var_min=False)
    model = start_from(folder, tiny_tokenizer, {"resample": False})
    assert (model.config.cross_attn, model.config.var_min, model.config.block_size) == (False, False, 32)
    assert not BUFFERS & set(model.state_dict())


@pytest.fixture
def learned(checkpoint):
    """A checkpoint of block size 4 whose interval has been searched for."""
    folder = checkpoint(block_size=4)
    weights = load_file(f"{folder}/model.safetensors")
    weights["sampling_eps_min"].fill_(0.45)
    weights["sampling_eps_max"].fill_(0.95)
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0.45, 0.95)),
        ({"block_size": 4}, (0.45, 0.95)),
        ({"sampling_eps_max": 0.8}, (0.45, 0.8)),
        ({"sampling_eps_min": 0.3, "sampling_eps_max": 0.8}, (0.3, 0.8)),
        ({"block_size": 16}, (1e-3, 1.0)),
        ({"block_size": 32}, (1e-3, 1.0)),
        ({"block_size": 16, "sampling_eps_min": 0.3}, (0.3, 1.0)),
        ({"block_size": 16, "sampling_eps_min": 0.3, "sampling_eps_max": 0.8}, (0.3, 0.8)),
    ],
)
def test_a_learned_interval_stays_with_its_block_size(learned, tiny_tokenizer, fields, expected, tmp_path):
    model = start_from(learned, tiny_tokenizer, fields)
    assert model.interval() == pytest.approx(expected)
    model.save_pretrained(tmp_path / "again")
    assert BD3LMForMaskedLM.from_pretrained(tmp_path / "again").interval() == pytest.approx(expected)


def test_a_changed_interval_is_logged_and_an_inherited_one_is_not(learned, tiny_tokenizer, caplog):
    start_from(learned, tiny_tokenizer, {})
    assert not caplog.records
    start_from(learned, tiny_tokenizer, {"block_size": 16})
    message = "blocks of 4 tokens become blocks of 16, with noise levels in [0.001, 1] instead of [0.45, 0.95]"
    assert [message in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("length", [8, 64])
def test_the_window_may_change_since_positions_are_rotary(checkpoint, tiny_tokenizer, length):
    folder = checkpoint(block_size=4)
    ids = torch.randint(4, 300, (2, length), generator=torch.Generator().manual_seed(0))
    model = start_from(folder, tiny_tokenizer, {"model_length": length}).eval()
    old = BD3LMForMaskedLM.from_pretrained(folder).eval()
    assert model.config.model_length == length
    scores = [m.token_nll(ids, estimator="exact").nll for m in (model, old)]
    assert torch.equal(*scores)


def test_a_longer_window_turns_full_diffusion_into_blocks(checkpoint, tiny_tokenizer):
    model = start_from(checkpoint(block_size=32, cross_attn=False), tiny_tokenizer, {"model_length": 64})
    assert (model.config.block_size, model.config.model_length, model.config.cross_attn) == (32, 64, True)


def test_a_checkpoint_in_half_precision_continues_in_single_precision(checkpoint, tiny_tokenizer, tmp_path):
    folder = checkpoint(block_size=4)
    BD3LMForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    model = start_from(str(tmp_path / "half"), tiny_tokenizer, {})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_special_tokens_that_the_checkpoint_does_not_set_are_the_tokenizers(checkpoint, tiny_tokenizer):
    config = start_from(checkpoint(block_size=4, eos_token_id=7), tiny_tokenizer, {}).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 7, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 3}, "block_size=3 does not divide model_length=32"),
        ({"model_length": 30}, "block_size=4 does not divide model_length=30"),
        ({"sampling_eps_min": 0.8, "sampling_eps_max": 0.3}, "sampling_eps_min=0.8, sampling_eps_max=0.3 is no"),
        ({"sampling_eps_max": 0.2}, "sampling_eps_min=0.4.*, sampling_eps_max=0.2"),
        ({"resample": True, "sampling_eps_min": 0.55, "sampling_eps_max": 0.7}, r"\[0.55, 0.7\] .* mask rate k / 4"),
    ],
)
def test_fields_that_do_not_fit_the_checkpoint_are_refused(learned, tiny_tokenizer, fields, message):
    with pytest.raises(ValueError, match=message):
        start_from(learned, tiny_tokenizer, fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_dim": 64}, "--hidden_dim 64 contradicts .*, whose hidden_dim is 16: .*leave out --hidden"),
        ({"n_heads": 4, "adaln": False}, "--n_heads 4 contradicts .*leave out --n_heads, --adaln"),
        ({"time_conditioning": True}, "--time_conditioning True contradicts .*, whose time_conditioning is False"),
    ],
)
def test_the_checkpoint_decides_the_shape_of_the_network(learned, fields, message):
    with pytest.raises(ValueError, match=message):
        check_shape(learned, fields)


def test_a_recipe_may_repeat_the_shape_of_the_checkpoint(learned, tiny_tokenizer):
    fields = {"hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8, "block_size": 8, "dropout": 0.1}
    check_shape(learned, fields)
    assert start_from(learned, tiny_tokenizer, fields).config.block_size == 8


HEAD = "backbone.output_layer.linear.bias"


@pytest.mark.parametrize(
    ("without", "changed", "message"),
    [
        ({HEAD, *BUFFERS}, {}, rf"has 1 missing weights \({HEAD}\)"),
        ({"sampling_eps_min"}, {}, r"has 1 missing weights \(sampling_eps_min\)"),
        ((), {"adaln": False}, r"has 8 unexpected weights \(backbone.blocks.0.adaLN_modulation.bias, "),
        ((), {"vocab_size": 400}, r"has 3 mismatched weights \(backbone.output_layer.linear.bias, .*vocab_embed"),
        ((), {"n_blocks": 2}, r"has 10 missing weights \(backbone.blocks.1.adaLN_modulation.bias, "),
    ],
)
def test_weights_that_do_not_fit_are_listed_at_a_new_block_size(checkpoint, tiny_tokenizer, without, changed, message):
    folder = checkpoint(block_size=32, cross_attn=False, without=without)
    config = Path(folder, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(ValueError, match=f"--init_from {folder} {message}"):
        start_from(folder, tiny_tokenizer, {"block_size": 4})


def test_a_tokenizer_of_another_vocabulary_is_refused_before_weights_are_read(checkpoint, tiny_tokenizer, tmp_path):
    folder = checkpoint(block_size=4)
    (tmp_path / "model.safetensors").unlink()
    tiny_tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match="token ids up to 320, but the model's vocab_size is 320"):
        start_from(folder, tiny_tokenizer, {})
