"""The configuration: impossible fields are refused with a remedy; published files load unchanged."""

import dataclasses
import json

import pytest
from transformers import AutoConfig, AutoModelForMaskedLM

from bd3lm_hf.modeling.configuration_bd3lm import ARConfig, BD3LMConfig, MDLMConfig, SEDDConfig
from bd3lm_hf.modeling.configuration_ssdlm import SSDLMConfig


# The config.json of the published checkpoints, as their remote code writes it.
PUBLISHED = json.loads("""{
  "_name_or_path": "kuleshov-group/bd3lm-owt-block_size4", "architectures": ["BD3LM"], "model_type": "bd3lm",
  "auto_map": {"AutoConfig": "configuration_bd3lm.BD3LMConfig", "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM"},
  "vocab_size": 50258, "block_size": 4, "model_length": 1024, "attn_backend": "flex", "hidden_dim": 768,
  "n_blocks": 12, "n_heads": 12, "cond_dim": 128, "dropout": 0.1, "adaln": true, "causal": false,
  "cross_attn": true, "var_min": true, "time_conditioning": false, "sampling_eps_max": 0.999,
  "sampling_eps_min": 0.001, "return_dict": false, "torch_dtype": "float32", "transformers_version": "4.49.0"
}""")

REFUSED = {
    "no_vocabulary": ({"vocab_size": 0}, "vocab_size=0"),
    "negative_layers": ({"n_blocks": -1}, "n_blocks=-1"),
    "no_conditioning_width": ({"cond_dim": 0}, "cond_dim=0"),
    "no_length": ({"model_length": 0}, "model_length=0"),
    "mask_alone": ({"vocab_size": 1}, "vocab_size=1"),
    "heads_that_do_not_divide": ({"hidden_dim": 100, "n_heads": 12}, "hidden_dim=100"),
    "odd_head": ({"hidden_dim": 36, "n_heads": 12}, "36 / 12 = 3"),
    "block_that_does_not_divide": ({"block_size": 6, "model_length": 32}, "block_size=6"),
    "mask_outside": ({"mask_token_id": 50258}, "mask_token_id=50258"),
    "mask_negative": ({"mask_token_id": -1}, "mask_token_id=-1"),
    "bos_outside": ({"bos_token_id": 60000}, "bos_token_id=60000"),
    "pad_outside": ({"pad_token_id": -3}, "pad_token_id=-3"),
    "eos_outside": ({"eos_token_id": 60000}, "eos_token_id=60000"),
    "one_eos_of_several_outside": ({"eos_token_id": [1, 60000]}, "eos_token_id="),
    "bos_is_mask": ({"bos_token_id": 50257}, "bos_token_id=50257"),
    "eos_is_mask": ({"eos_token_id": 7, "mask_token_id": 7}, "eos_token_id=7"),
    "one_eos_is_mask": ({"eos_token_id": [3, 7], "mask_token_id": 7}, r"eos_token_id=\[3, 7\]"),
    "unknown_schedule": ({"noise": "linear"}, "noise='linear'.* loglinear, square"),
    "dropout_of_one": ({"dropout": 1.0}, r"dropout=1\.0"),
    "negative_dropout": ({"dropout": -0.1}, r"dropout=-0\.1"),
    "reversed_interval": (
        {"sampling_eps_min": 0.8, "sampling_eps_max": 0.3},
        r"sampling_eps_min=0\.8, sampling_eps_max=0\.3",
    ),
    "interval_above_one": ({"sampling_eps_max": 1.5}, r"sampling_eps_max=1\.5"),
    "interval_below_zero": ({"sampling_eps_min": -0.5}, r"sampling_eps_min=-0\.5"),
    "interval_of_zero": ({"sampling_eps_min": 0.0, "sampling_eps_max": 0.0}, "with sampling_eps_max > 0"),
    "interval_that_is_no_number": ({"sampling_eps_min": float("nan")}, "sampling_eps_min=nan"),
    "unreachable_interval": (
        {"resample": True, "sampling_eps_min": 0.55, "sampling_eps_max": 0.7},
        r"the interval \[0\.55, 0\.7\] contains no mask rate k / 4: widen it, or set resample=False",
    ),
    "unknown_stratification": ({"antithetic_sampling": True}, "antithetic_sampling=True"),
    "causal_with_clean_stream": ({"causal": True}, "causal=True"),
    "blocks_without_clean_stream": ({"cross_attn": False}, "cross_attn=False"),
    "time_without_adaln": ({"time_conditioning": True, "adaln": False}, "time_conditioning=True"),
    "no_draws": ({"noise_draws": 0}, "noise_draws=0"),
    "half_a_draw": ({"noise_draws": 1.5}, "noise_draws"),
    "unknown_masking": ({"masking": "all"}, "masking='all'"),
    "exact_k_resampled": ({"masking": "exact_k", "resample": True}, "resample=True"),
    "exact_k_at_a_noise_level": ({"masking": "exact_k", "time_conditioning": True}, "time_conditioning=True"),
    "exact_k_in_pairs": ({"masking": "exact_k", "complementary": True}, "complementary=True"),
    "pairs_at_a_noise_level": ({"complementary": True, "time_conditioning": True}, "time_conditioning=False"),
    "draws_that_share_no_clean_stream": ({"noise_draws": 4, "time_conditioning": True}, "noise_draws=4"),
}


WRONG_TYPES = {
    "bos_token_id": ["0", 1.5, True, [0]],
    "eos_token_id": ["0", [0, "1"], [1.5], {}],
    "pad_token_id": ["0", 1.5],
    "mask_token_id": ["0", 1.5, True],
    "dropout": ["0.1", None, True],
    "sampling_eps_min": ["0", None],
    "sampling_eps_max": ["1", [1.0]],
    "noise": [None, 3],
    "antithetic_sampling": [["none"], None],
    "adaln": ["yes", 1, None],
    "time_conditioning": ["no"],
    "causal": [0],
    "use_cache": ["True"],
    "n_blocks": ["2"],
    "n_heads": [True, 2.0],
    "hidden_dim": [768.0],
}


@pytest.mark.parametrize("name", ["model_length", "max_position_embeddings"])
@pytest.mark.parametrize("config", [MDLMConfig, SEDDConfig])
def test_the_block_of_masked_diffusion_is_as_long_as_any_given_window(config, name, tmp_path):
    made = config(**{name: 64})
    made.save_pretrained(tmp_path)
    for found, length in ((made, 64), (config.from_pretrained(tmp_path, **{name: 16}), 16)):
        assert (found.model_length, found.block_size) == (length, length)


@pytest.mark.parametrize("config", [BD3LMConfig, ARConfig, MDLMConfig, SEDDConfig, SSDLMConfig])
@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG_TYPES.items() for value in values])
def test_a_field_of_the_wrong_type_or_size_is_refused_by_name(config, name, value):
    known = {field.name: field.default for field in dataclasses.fields(config)}
    if name not in known or (value is None and known[name] is None):
        pytest.skip(f"{config.__name__} takes {name}={value!r}")
    with pytest.raises(ValueError, match=name):
        config(**{name: value})


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED.keys())
def test_an_impossible_field_is_refused_with_a_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        BD3LMConfig(**fields)


def test_whole_numbers_are_probabilities_and_without_resampling_any_interval_is_valid():
    assert not BD3LMConfig(sampling_eps_min=0.55, sampling_eps_max=0.7).resample
    assert BD3LMConfig(dropout=0, sampling_eps_min=0, sampling_eps_max=1).dropout == 0


def test_the_published_config_loads_unchanged(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = BD3LMConfig.from_pretrained(tmp_path)
    same = set(PUBLISHED) - {"_name_or_path", "auto_map", "return_dict", "torch_dtype", "transformers_version"}
    assert {name: getattr(config, name) for name in same} == {name: PUBLISHED[name] for name in same}
    assert config.mask_token_id == 50257
    assert config.num_blocks(1024) == 256
    config = BD3LMConfig(**PUBLISHED, tie_word_embeddings=True)  # outputs have names, and the head is not tied
    assert config.return_dict is True and config.tie_word_embeddings is False
    pretraining = BD3LMConfig(**{**PUBLISHED, "block_size": 1024, "cross_attn": False, "attn_backend": "sdpa"})
    assert pretraining.num_blocks(1024) == 1


@pytest.mark.parametrize("ours", [False, True])
def test_a_config_without_a_block_size_has_the_default_of_its_code(tmp_path, ours):
    fields = BD3LMConfig().to_dict() if ours else dict(PUBLISHED)
    del fields["block_size"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for loader in (BD3LMConfig, AutoConfig):
        assert loader.from_pretrained(tmp_path).block_size == (4 if ours else 1)


def test_sedd_in_the_published_layout_is_not_a_bd3lm(tmp_path):
    fields = {**PUBLISHED, "time_conditioning": True, "cross_attn": False, "block_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for loader in (AutoConfig, AutoModelForMaskedLM):
        with pytest.raises(ValueError, match="SEDD.*--model-type sedd"):
            loader.from_pretrained(tmp_path)
    config = BD3LMConfig(**{name: value for name, value in fields.items() if name != "auto_map"})
    config.save_pretrained(tmp_path)  # written by this code: a BD3-LM with one block, as it says
    assert BD3LMConfig.from_pretrained(tmp_path).time_conditioning


def test_the_standard_names_of_sizes_read_and_write_ours():
    config = BD3LMConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
    assert (config.hidden_dim, config.n_blocks, config.n_heads, config.model_length) == (96, 3, 4, 64)
    config.hidden_dim = 128
    assert (config.hidden_size, config.head_dim) == (128, 32)


def test_the_mask_is_the_last_id_unless_it_is_named():
    assert BD3LMConfig(vocab_size=100).mask_token_id == 99
    assert BD3LMConfig(vocab_size=30522, mask_token_id=103).mask_token_id == 103
    assert BD3LMConfig(vocab_size=100, mask_token_id=0).mask_token_id == 0


@pytest.mark.parametrize("length, blocks", [(1, 1), (4, 1), (5, 2), (1024, 256), (1025, 257)])
def test_the_last_block_of_a_sequence_can_be_shorter(length, blocks):
    assert BD3LMConfig(block_size=4).num_blocks(length) == blocks


def test_every_field_survives_saving_and_loading(tmp_path):
    fields = {"vocab_size": 64, "block_size": 8, "model_length": 64, "hidden_dim": 24, "n_blocks": 3, "n_heads": 2}
    fields |= {"cond_dim": 12, "dropout": 0.25, "time_conditioning": True, "mask_token_id": 5, "noise": "cosine"}
    fields |= {"var_min": False, "sampling_eps_min": 0.25, "sampling_eps_max": 0.75, "resample": True}
    fields |= {"antithetic_sampling": "published", "ignore_bos": False, "use_cache": False}
    config = BD3LMConfig(**fields, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=5)
    config.save_pretrained(tmp_path)
    loaded = BD3LMConfig.from_pretrained(tmp_path)
    before, after = config.to_dict(), loaded.to_dict()
    assert {name: after[name] for name in before} == before
    assert after["eos_token_id"] == [2, 3]
