"""SSD-LM's simplex and `generate`: the published trajectory, projections, batches, processors, ends, refusals."""

from itertools import pairwise

import pytest
import torch
from generating import Recorder, batch_of, prompts_of
from published import published_ssdlm
from transformers import DynamicCache, GenerationConfig
from transformers.generation.logits_process import LogitsProcessor

from bd3lm_hf import SSDLMConfig, SSDLMForMaskedLM, SSDLMGenerationConfig
from bd3lm_hf.modeling.generation_ssdlm import (
    SimplexWriter,
    almost_one_hot,
    noisy_logits,
    nucleus,
    project_by_sampling,
    project_evenly,
    project_unevenly,
    simplex_alpha_bar,
)


RECORDED = "11_ssdlm"
PROMPT = prompts_of([5])[0][None]
K, TOP_P = 5.0, 0.95


@pytest.fixture(scope="module")
def model():
    """Return a tiny model whose texts vary: bos 0, eos 1, pad 2, mask 47, blocks of 4 in a window of 24."""
    sizes = {"vocab_size": 48, "hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "dropout": 0.0}
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 2}
    model = SSDLMForMaskedLM(SSDLMConfig(**sizes, **special, block_size=4, model_length=24)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.6 if "bias" not in name else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + ("LayerNorm.weight" in name))
    return model


def generate(model, prompt, *, seed=0, **arguments):
    """Generate with three steps per block, seeded."""
    arguments = {"max_new_tokens": 10, "num_denoising_steps": 3, "return_dict_in_generate": True, **arguments}
    if "generator" not in arguments:
        arguments["generator"] = torch.Generator().manual_seed(seed)
    return model.generate(prompt, **arguments)


@pytest.fixture
def seen(model, monkeypatch):
    """Record the inputs of the network: contexts, masks, noisy logits and times, in order."""
    calls, denoise = [], model.denoise

    def watched(context, mask, noisy, timesteps):
        calls.append((context.clone(), mask, noisy.clone(), timesteps.clone()))
        return denoise(context, mask, noisy, timesteps)

    monkeypatch.setattr(model, "denoise", watched)
    return calls


# --- Schedule, noise and projections ---------------------------------------------------------------------------------


def test_the_schedule_is_the_published_one(recorded):
    now, before = (simplex_alpha_bar(recorded["sched.t"] - back, 1000) for back in (0, 1))
    found = (now, before, now / before)
    published = tuple(recorded[f"sched.{name}"] for name in ("alpha_t_bar", "alpha_t_minus_bar", "alpha_t"))
    torch.testing.assert_close(found, published, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("project", "name"), [(project_evenly, "even"), (project_unevenly, "uneven")])
def test_projections_are_the_published_ones(recorded, project, name):
    projected = project(recorded["proj.logits"], K, TOP_P)
    torch.testing.assert_close(projected.logits, recorded[f"proj.{name}"], atol=1e-5, rtol=0)
    assert torch.equal(projected.input_ids, recorded["proj.logits"].argmax(-1))


def test_sampling_draws_from_the_published_probabilities(recorded):
    seen = []

    def draw(scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.softmax(-1))
        return recorded["proj.sampled_ids"].flatten()

    projected = project_by_sampling(recorded["proj.logits"], K, TOP_P, draw)
    torch.testing.assert_close(seen[0].view(2, 3, -1), recorded["proj.sampling_probs"], atol=1e-6, rtol=0)
    assert torch.equal(projected.logits, recorded["proj.sampling"].float())
    assert torch.equal(projected.input_ids, recorded["proj.sampled_ids"])


def test_noise_is_added_as_published(recorded):
    clean = almost_one_hot(recorded["train.diffusion_ids"], 41, K)
    assert torch.equal(clean, recorded["train.clean_logits"].float())
    alpha_bar = simplex_alpha_bar(recorded["train.t"], 1000)
    noisy = noisy_logits(clean, alpha_bar, recorded["train.normal"], K)
    torch.testing.assert_close(noisy, recorded["train.noisy_logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(noisy.softmax(-1), recorded["train.simplex"], atol=1e-6, rtol=0)


def test_the_nucleus_keeps_the_token_that_crosses():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert nucleus(logits, 0.9).tolist() == [True, True, True, False]
    assert nucleus(logits, 0.7).tolist() == [True, True, False, False]
    assert nucleus(logits, 1e-9).tolist() == [True, False, False, False]
    assert nucleus(logits, 1.0).all()


# --- The published trajectory ----------------------------------------------------------------------------------------


def test_the_whole_trajectory_is_the_published_one(recorded, monkeypatch):
    model = published_ssdlm()

    # The published draws: a block's first noise, then each step's noise and tokens.
    first, later, drawn = (recorded[f"decode.{name}"] for name in ("init_normal", "step_normal", "sampled_ids"))
    noise = iter([x for block in range(4) for x in (first[block], *later[block, :5])])
    tokens = iter([x for block in range(4) for x in drawn[block, :5]])
    monkeypatch.setattr(SimplexWriter, "_normal", lambda self, rows, shape, device: next(noise).view(1, *shape))
    monkeypatch.setattr(SimplexWriter, "_draw", lambda self, rows, scores: next(tokens))
    logits, denoise = [], model.denoise
    monkeypatch.setattr(model, "denoise", lambda *a: logits.append(denoise(*a).clone()) or logits[-1].clone())
    options = {"context": "previous_block", "eos_token_id": None, "return_dict_in_generate": True}
    options |= {"max_new_tokens": 20, "num_denoising_steps": 6, "output_logits": True}
    context = recorded["decode.context"]
    output = model.generate(context, attention_mask=torch.ones_like(context), **options)
    trajectory = torch.cat(logits).view(4, 6, 5, 41)
    torch.testing.assert_close(trajectory, recorded["decode.logits"], atol=1e-4, rtol=0)
    assert torch.equal(output.sequences[:, 4:], recorded["decode.ids"])
    assert output.num_forward_passes == 24 and output.tokens_per_forward == pytest.approx(20 / 24)
    last = torch.stack(output.logits, dim=1)[0].view(4, 5, 41)
    torch.testing.assert_close(last, recorded["decode.logits"][:, 5], atol=1e-4, rtol=0)


# --- Contexts and projections ----------------------------------------------------------------------------------------


def test_a_block_sees_all_text_before_it_or_the_block_before_it(model, seen):
    prompt = prompts_of([6])[0][None]
    text = generate(model, prompt, max_new_tokens=11).sequences[0]
    assert [call[0].shape[1] for call in seen] == [6] * 3 + [10] * 3 + [14] * 3
    assert torch.equal(seen[-1][0][0], text[:14])
    seen.clear()
    text = generate(model, prompt, max_new_tokens=11, context="previous_block").sequences[0]
    assert [call[0].shape[1] for call in seen] == [6] * 3 + [4] * 6
    assert torch.equal(seen[-1][0][0], text[10:14])
    seen.clear()  # the context is as long as the window leaves room
    text = generate(model, prompts_of([18])[0][None], max_new_tokens=8).sequences[0]
    assert [call[0].shape[1] for call in seen] == [18] * 3 + [20] * 3
    assert torch.equal(seen[-1][0][0], text[2:22])


@pytest.mark.parametrize("projection", ["sampling", "even", "uneven"])
def test_every_projection_generates_a_different_text_which_the_seed_determines(model, projection):
    prompt = prompts_of([5])[0].repeat(2, 1)
    first, again, other = (generate(model, prompt, seed=seed, projection=projection).sequences for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[0], first[1])
    assert first.shape == (2, 15)


def test_a_small_nucleus_is_the_most_likely_token_and_chosen_once(model):
    texts = [
        generate(model, PROMPT, projection=projection, top_p=1e-6, do_sample=False).sequences
        for projection in ("sampling", "even", "uneven")
    ]
    assert all(torch.equal(one, other) for one, other in pairwise(texts))
    # `top_p` belongs to the projection: applied as a logits processor too, it would cut the distribution twice.
    processors = model._get_logits_processor(SSDLMGenerationConfig(top_k=0), 5, encoder_input_ids=PROMPT, device="cpu")
    assert len(processors) == 0


def test_torchs_global_generator_is_the_default_and_texts_without_a_prompt_begin_with_the_first_token(model):
    texts = []
    for _ in range(2):
        torch.manual_seed(7)
        texts.append(generate(model, PROMPT, generator=None).sequences)
    assert torch.equal(*texts)
    output = model.generate(max_new_tokens=5, num_denoising_steps=2)
    assert output.shape == (1, 6) and output[0, 0] == 0


# --- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("context", ["all", "previous_block"])
def test_with_a_generator_per_row_a_batch_equals_its_prompts_alone(model, side, context):
    prompts = prompts_of([3, 9, 6])
    batch = batch_of(prompts, side)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    many = generate(model, batch.pop("input_ids"), **batch, generator=generators, context=context)
    assert many.num_forward_passes == 9
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], seed=row, context=context).sequences[0]
        assert torch.equal(many.sequences[row, 9:], alone[len(prompt) :])


# --- Processors, ends, streams ---------------------------------------------------------------------------------------


class Only(LogitsProcessor):
    """Allows a few ids."""

    reads_text = False

    def __init__(self, *ids):
        self.ids = ids

    def __call__(self, input_ids, scores):
        kept = torch.full_like(scores, -torch.inf)
        kept[:, list(self.ids)] = scores[:, list(self.ids)]
        return kept


class Counting(LogitsProcessor):
    """Allow only the last token plus one, which requires every token to the left."""

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).scatter(1, input_ids[:, -1:] + 1, 0.0)


@pytest.mark.parametrize("projection", ["sampling", "even", "uneven"])
def test_processors_constrain_tokens_and_see_the_text_to_the_left(model, projection):
    output = generate(model, PROMPT, projection=projection, logits_processor=[Only(11, 12)])
    assert set(output.sequences[0, 5:].tolist()) <= {11, 12}
    output = generate(model, torch.tensor([[9, 5], [2, 20]]), attention_mask=torch.tensor([[1, 1], [0, 1]]),
                   projection=projection, logits_processor=[Counting()])  # fmt: skip
    assert output.sequences[0, 2:].tolist() == list(range(6, 16))
    assert output.sequences[1, 2:].tolist() == list(range(21, 31))


def test_special_tokens_are_tokens_like_others_and_processors_that_leave_none_are_refused(model):
    text = generate(model, torch.tensor([[3, 47]]), logits_processor=[Only(2, 47)]).sequences[0].tolist()
    assert text[:2] == [3, 47] and set(text[2:]) == {2, 47}
    with pytest.raises(ValueError, match="the logits processors forbid every token"):
        generate(model, PROMPT, logits_processor=[Only()])


def test_an_end_token_ends_its_row_and_the_others_continue(model, seen):
    batch = torch.stack(prompts_of([5, 5]))
    generators = lambda: [torch.Generator().manual_seed(seed) for seed in (1, 8)]  # noqa: E731
    free = generate(model, batch, generator=generators(), max_new_tokens=12).sequences[:, 5:]
    end = next(int(token) for token in free[0, :4] if token not in free[1])
    first = free[0].tolist().index(end)
    seen.clear()
    output = generate(model, batch, generator=generators(), max_new_tokens=12, eos_token_id=end)
    assert output.sequences[0, 5:].tolist() == free[0, : first + 1].tolist() + [2] * (11 - first)
    assert torch.equal(output.sequences[1, 5:], free[1])
    assert [len(context) for context, *_ in seen] == [2] * 3 + [1] * 6  # an ended row costs nothing more
    assert output.tokens_per_forward == pytest.approx((first + 1 + 12) / 9 / 2)
    end = int(generate(model, PROMPT, max_new_tokens=4).sequences[0, 6])  # of all rows: it ends the call
    output = generate(model, PROMPT, max_new_tokens=40, eos_token_id=end)
    assert output.num_forward_passes == 3 and output.sequences[0, -1] == end


def test_text_is_streamed_block_by_block(model):
    streamer = Recorder()
    text = generate(model, PROMPT, streamer=streamer).sequences[0].tolist()
    assert [len(piece) for piece in streamer.puts] == [5, 4, 4, 2] and streamer.ended
    assert sum(streamer.puts, []) == text


def test_scores_of_the_last_step_are_returned(model):
    output = generate(model, PROMPT, output_scores=True, output_logits=True, temperature=0.5)
    assert len(output.scores) == len(output.logits) == 10
    scores, logits = (torch.stack(kept, dim=1) for kept in (output.scores, output.logits))
    assert torch.equal(scores.argmax(-1), output.sequences[:, 5:])
    finite = logits.isfinite()
    torch.testing.assert_close(scores[finite], logits[finite] / 0.5)


# --- The generation config -------------------------------------------------------------------------------------------


def test_the_fields_survive_saving_and_loading(model, tmp_path):
    model.generation_config.projection, kept = "uneven", model.generation_config.projection
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.generation_config.projection = kept
    loaded = SSDLMForMaskedLM.from_pretrained(tmp_path).generation_config
    assert type(loaded) is SSDLMGenerationConfig
    kept = (loaded.projection, loaded.context, loaded.top_p, loaded.num_denoising_steps)
    assert kept == ("uneven", "all", 0.95, 1000)
    assert loaded.do_sample is True and loaded.bos_token_id == 0
    plain = GenerationConfig(max_new_tokens=4, num_denoising_steps=2)
    assert model.generate(PROMPT, generation_config=plain).shape == (1, 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_denoising_steps": 0}, "num_denoising_steps=0"),
        ({"num_denoising_steps": 2.5}, "num_denoising_steps=2.5"),
        ({"top_p": 0.0}, "top_p=0.0: give a probability above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5: give a probability"),
        ({"projection": "odd"}, "projection='odd' is unknown: choose one of sampling, even, uneven"),
        ({"context": "none"}, "context='none' is unknown: choose one of all, previous_block"),
    ],
)
def test_meaningless_fields_are_refused(model, fields, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, **fields)
    with pytest.raises(ValueError, match=message):
        SSDLMGenerationConfig(**fields).validate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": [torch.Generator()]}, "1 generators for 2 rows"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"noisy_logits": torch.zeros(2, 4, 48)}, "generation does not take noisy_logits"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"input_ids": torch.tensor([[3, 48]])}, "the prompt contains the id 48, outside the vocabulary of 48"),
        ({"input_ids": torch.full((1, 25), 3)}, "the prompt has 25 tokens, more than .* window model_length=24"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, arguments, message):
    given = {"input_ids": torch.tensor([[3, 4], [5, 6]]), "max_new_tokens": 4, "num_denoising_steps": 1}
    with pytest.raises(ValueError, match=message):
        model.generate(**{**given, **arguments})
