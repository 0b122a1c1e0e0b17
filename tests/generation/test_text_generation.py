"""Texts of a set length: the same alone and in any batch, to full length or to their end."""

import pytest
import torch

from bd3lm_hf.generation.text_generation import generate_batch
from bd3lm_hf.modeling.configuration_bd3lm import ARConfig, SEDDConfig
from bd3lm_hf.modeling.configuration_ssdlm import SSDLMConfig
from bd3lm_hf.modeling.modeling_ar import ARForCausalLM
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.modeling_sedd import SEDDForMaskedLM
from bd3lm_hf.modeling.modeling_ssdlm import SSDLMForMaskedLM


SEEDS = [11, 12, 13, 14]
SIZES = {"vocab_size": 48, "model_length": 16, "hidden_dim": 32, "n_blocks": 2, "n_heads": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampler": "ancestral", "num_denoising_steps": 3},
        {"sampler": "confidence", "confidence_threshold": 0.05},
        {"sampler": "entropy_bound", "entropy_bound": 2.0},
        {"remask_fraction": 0.5},
        {"nucleus_p": 0.9, "sampling_dtype": "float64"},
    ],
)
def test_a_sampled_text_does_not_depend_on_its_batch(make_model, fields):
    model = make_model(block_size=4)
    prompts = [[0, 5, 6]] * 4
    together = generate_batch(model, prompts, 13, seeds=SEEDS, do_sample=True, **fields)
    pairs = [
        generate_batch(model, prompts[:2], 13, seeds=SEEDS[at : at + 2], do_sample=True, **fields) for at in (0, 2)
    ]
    alone = [generate_batch(model, prompts[:1], 13, seeds=[seed], do_sample=True, **fields)[0] for seed in SEEDS]
    expected = [(text.ids, text.forwards) for text in alone]
    assert [(text.ids, text.forwards) for text in together] == expected
    assert [(text.ids, text.forwards) for pair in pairs for text in pair] == expected
    assert len({tuple(text.ids) for text in together}) == 4
    assert all(text.ids[:3] == [0, 5, 6] and len(text.new_ids) == 13 for text in together)


def test_texts_are_written_to_full_length_and_the_model_ends_texts_again_afterwards(tiny_config, randomize):
    model = randomize(BD3LMForMaskedLM(tiny_config)).eval()
    with torch.no_grad():
        model.backbone.output_layer.linear.bias[tiny_config.eos_token_id] += 5
    whole = generate_batch(model, [[0]] * 4, 12, seeds=SEEDS, do_sample=True)
    ended = generate_batch(model, [[0]] * 4, 12, seeds=SEEDS, do_sample=True, stop_at_eos=True)
    assert model.generation_config.eos_token_id == tiny_config.eos_token_id
    assert {len(text.new_ids) for text in whole} == {12}
    for text, full in zip(ended, whole, strict=True):
        end = full.new_ids.index(tiny_config.eos_token_id) + 1
        assert text.new_ids == full.new_ids[:end]


def test_a_model_with_one_source_of_randomness_writes_texts_one_by_one(randomize):
    model = randomize(ARForCausalLM(ARConfig(**SIZES))).eval()
    assert not model.generator_per_row
    together = generate_batch(model, [[0, 7]] * 3, 6, seeds=SEEDS[:3], do_sample=True)
    alone = generate_batch(model, [[0, 7]], 6, seeds=SEEDS[2:3], do_sample=True)
    assert together[2].ids == alone[0].ids and together[0].ids != together[1].ids
    assert [text.forwards for text in together] == [6, 6, 6]


def test_baselines_that_denoise_draw_by_row_too(randomize):
    model = randomize(SEDDForMaskedLM(SEDDConfig(**SIZES, cond_dim=16))).eval()
    together = generate_batch(model, [[0]] * 3, 15, seeds=SEEDS[:3], do_sample=True)
    alone = [generate_batch(model, [[0]], 15, seeds=[seed], do_sample=True)[0] for seed in SEEDS[:3]]
    assert [text.ids for text in together] == [text.ids for text in alone]


def test_simplex_diffusion_generator_per_row_too(randomize):
    sizes = {"hidden_dim": 16, "n_blocks": 1, "n_heads": 2}
    config = SSDLMConfig(vocab_size=48, model_length=20, block_size=5, bos_token_id=0, **sizes)
    model = randomize(SSDLMForMaskedLM(config)).eval()
    how = {"do_sample": True, "num_denoising_steps": 3}
    together = generate_batch(model, [[0]] * 3, 10, seeds=SEEDS[:3], **how)
    alone = [generate_batch(model, [[0]], 10, seeds=[seed], **how)[0] for seed in SEEDS[:3]]
    assert [(text.ids, text.forwards) for text in together] == [(text.ids, text.forwards) for text in alone]
    assert together[0].forwards == 2 * 3


def test_sources_that_do_not_fit_the_rows_are_refused(tiny_model):
    with pytest.raises(ValueError, match="1 generators for 2 rows"):
        tiny_model.generate(torch.zeros(2, 1, dtype=torch.long), max_new_tokens=4, generator=[torch.Generator()])
