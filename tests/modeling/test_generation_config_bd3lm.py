"""The generation fields of block diffusion: defaults, refusals, and round trips through files and pipelines."""

import functools
import inspect
import re

import pytest
import torch
from decoders import tiny_decoder
from generating import make_family
from shared_models import tiny_ssdlm
from transformers import AutoModelForMaskedLM, GenerationConfig

from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM


# The default of every field, and another value.
FIELDS = {
    "sampler": ("first_hitting", "confidence"),
    "num_denoising_steps": (None, 3),
    "confidence_threshold": (0.9, 0.5),
    "entropy_bound": (0.1, 0.25),
    "remask_fraction": (0.0, 0.5),
    "nucleus_p": (1.0, 0.9),
    "sampling_dtype": ("float32", "float64"),
    "window": ("cached", "exact"),
    "entropy_stop": (None, 4.0),
    "entropy_stop_window": (256, 64),
    "stop_at_second_eos": (False, True),
    "output_trace": (False, True),
}
DEFAULTS, OTHERS = ({name: values[i] for name, values in FIELDS.items()} for i in range(2))


def fields_of(config) -> dict:
    return {name: getattr(config, name) for name in DEFAULTS}


def test_the_defaults_are_those_of_the_paper(tiny_model):
    assert fields_of(BD3LMGenerationConfig()) == fields_of(tiny_model.generation_config) == DEFAULTS
    assert fields_of(tiny_model._prepare_generation_config(GenerationConfig())[0]) == DEFAULTS
    for config, arguments, top_k in (
        (None, {}, 0),
        (GenerationConfig(do_sample=True), {}, 0),
        (None, {"top_k": 7}, 7),
        (GenerationConfig(top_k=9), {}, 9),
    ):
        assert tiny_model._prepare_generation_config(config, **arguments)[0].top_k == top_k
    # All fields are arguments of `generate`.
    prepared, rest = tiny_model._prepare_generation_config(None, return_dict_in_generate=True, **OTHERS)
    assert fields_of(prepared) == OTHERS and not rest


def test_all_fields_survive_the_checkpoint(tiny_model, tmp_path):
    for name, value in OTHERS.items():
        setattr(tiny_model.generation_config, name, value)
    tiny_model.generation_config.return_dict_in_generate = True
    tiny_model.save_pretrained(tmp_path)
    for loaded in (
        BD3LMForMaskedLM.from_pretrained(tmp_path).generation_config,
        AutoModelForMaskedLM.from_pretrained(tmp_path).generation_config,
        BD3LMGenerationConfig.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded, BD3LMGenerationConfig)
        assert fields_of(loaded) == OTHERS
    again = BD3LMForMaskedLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert fields_of(BD3LMForMaskedLM.from_pretrained(tmp_path / "again").generation_config) == OTHERS


@pytest.mark.parametrize("loader", [BD3LMForMaskedLM, AutoModelForMaskedLM])
def test_all_config_fields_are_arguments_of_from_pretrained(tiny_model, tmp_path, loader):
    tiny_model.save_pretrained(tmp_path)
    config = tiny_model.config.to_dict()
    fields = {name: config[name] for name in inspect.signature(BD3LMConfig).parameters if name in config}
    loaded = loader.from_pretrained(tmp_path, **{**fields, "block_size": 2, "noise_draws": 3})
    assert (loaded.config.block_size, loaded.config.noise_draws) == (2, 3)
    assert not hasattr(loaded.generation_config, "block_size")
    with pytest.raises(TypeError, match="samplr"):
        BD3LMForMaskedLM.from_pretrained(tmp_path, samplr="confidence")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "magic"}, "sampler='magic' is unknown: choose one of first_hitting, ancestral, confidence, ent"),
        ({"sampling_dtype": "float16"}, "sampling_dtype='float16' is unknown: choose one of float32, float64"),
        ({"window": "sliding"}, "window='sliding' is unknown: choose one of cached, exact"),
        ({"num_denoising_steps": 0}, "num_denoising_steps=0: give"),
        ({"num_denoising_steps": -3}, "num_denoising_steps=-3"),
        ({"num_denoising_steps": 2.5}, "num_denoising_steps=2.5: give"),
        ({"num_denoising_steps": True}, "num_denoising_steps=True: give"),
        ({"confidence_threshold": -0.1}, "confidence_threshold=-0.1: give a probability from 0"),
        ({"confidence_threshold": 1.5}, "confidence_threshold=1.5: give a probability from 0 .* to 1"),
        ({"confidence_threshold": None}, "confidence_threshold=None: give a probability"),
        ({"entropy_bound": -1.0}, "entropy_bound=-1.0: give a number of nats, 0 .* or more"),
        ({"entropy_bound": float("nan")}, "entropy_bound=nan: give a number of nats"),
        ({"remask_fraction": -0.5}, "remask_fraction=-0.5: give"),
        ({"remask_fraction": 1.1}, "remask_fraction=1.1: give"),
        ({"nucleus_p": 0.0}, "nucleus_p=0.0: give a probability above 0 and at most 1"),
        ({"nucleus_p": 1.5}, "nucleus_p=1.5: give a probability above 0"),
        ({"nucleus_p": "0.9"}, "nucleus_p='0.9': give a probability above 0"),
        ({"entropy_stop": 0.0}, "entropy_stop=0.0: give a positive number of nats"),
        ({"entropy_stop": "low"}, "entropy_stop='low': give a positive number"),
        ({"entropy_stop": 4.0, "entropy_stop_window": 1}, "entropy_stop_window=1: give at least 2 tokens"),
        ({"entropy_stop": 4.0, "entropy_stop_window": 2.5}, "entropy_stop_window=2.5: give at least 2 tokens"),
        ({"stop_at_second_eos": "yes"}, "stop_at_second_eos='yes': give True or False"),
        ({"output_trace": 1}, "output_trace=1: give True or False"),
    ],
    ids=str,
)
def test_meaningless_fields_are_refused(tiny_model, fields, message):
    with pytest.raises(ValueError, match=message):
        BD3LMGenerationConfig(**fields)
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(torch.tensor([[5]]), max_new_tokens=2, return_dict_in_generate=True, **fields)


def test_a_dict_as_generation_config_names_fields_and_misspelt_ones_are_refused(make_model):
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=9, sampler="confidence", confidence_threshold=0.0)
    fields = {"max_new_tokens": 5, "sampler": "confidence", "confidence_threshold": 0.0}
    assert torch.equal(model.generate(ids, generation_config=fields, max_new_tokens=9), expected)
    blanks = torch.tensor([[5, 6, 47, 47]])
    named = model.infill(blanks, generation_config={"remask_fraction": 1.0})
    assert torch.equal(named, model.infill(blanks, remask_fraction=1.0))
    with pytest.raises(ValueError, match="smapler"):
        model.generate(ids, generation_config={"smapler": "confidence"})
    model.generation_config.smapler = "confidence"
    for call, given in ((model.generate, ids), (model.infill, blanks)):
        with pytest.raises(ValueError, match="unknown fields: smapler"):
            call(given)


@pytest.mark.parametrize(("sampler", "warns"), [({}, True), ({"sampler": "confidence"}, False)])
def test_a_field_of_another_sampler_warns_but_not_if_the_models_own_configuration_has_it(
    make_model, caplog, sampler, warns
):
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    model.generation_config.entropy_bound = 0.25
    model.generate(ids, max_new_tokens=1, confidence_threshold=0.123, **sampler)
    assert ("confidence_threshold=0.123" in caplog.text) is warns and "entropy_bound" not in caplog.text


OUTSIDE = {
    "max_new_tokens": (0, -4, 2.5),
    "min_new_tokens": (-1,),
    "num_return_sequences": (0, -1),
    "no_repeat_ngram_size": (-1,),
    "max_time": (-1.0,),
    "top_p": (1.5, -0.1, "0.5"),
    "typical_p": (0.0, 2.0),
    "epsilon_cutoff": (1.5,),
    "do_sample": ("no",),
    "eos_token_id": (999, [1, 999]),
    "pad_token_id": (999,),
    "suppress_tokens": ([3, 999],),
}


@pytest.mark.parametrize("family", ["bd3lm", "ar", "mdlm", "sedd", "llama", "ssdlm"])
def test_values_of_standard_fields_outside_their_range_are_refused(family):
    others = {"ssdlm": tiny_ssdlm, "llama": functools.partial(tiny_decoder, "llama")}
    model, ids = others.get(family, functools.partial(make_family, family))().float(), torch.tensor([[5, 6, 7]])
    for name, values in OUTSIDE.items():
        for value in values:
            fields = {"do_sample": True, "max_new_tokens": 2, name: value}
            with pytest.raises(ValueError, match=rf"{name}.*{re.escape(str(value))}"):
                model.generate(ids, **fields)
            with pytest.raises(ValueError, match=name):  # including those of a config that is passed
                model.generate(ids, GenerationConfig(**fields))


def test_the_ends_of_the_ranges_are_allowed(tiny_model):
    ids = torch.tensor([[5, 6, 7]])
    edges = {"top_p": 1.0, "min_p": 0.0, "epsilon_cutoff": 0.0, "typical_p": 1.0, "top_k": 0, "min_new_tokens": 0}
    edges |= {"confidence_threshold": 1, "entropy_bound": 0, "remask_fraction": 0, "nucleus_p": 1}  # whole numbers
    assert tiny_model.generate(ids, do_sample=True, max_new_tokens=1, **edges).shape == (1, 4)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(tiny_model.generate(ids, **greedy), tiny_model.generate(ids, **greedy, temperature=0.0))
