"""`generate` for every model family, sampler, cache and window, against a plain loop and transformers' behaviour."""

import re
import threading

import pytest
import torch
from generating import (
    FAMILIES,
    FIELDS,
    MASK,
    PAD,
    Recorder,
    assert_same,
    batch_of,
    generate,
    make_family,
    new_tokens,
    plain_loop,
    prompts_of,
)
from shared_models import special_ids
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import streamers
from transformers.generation.streamers import TextIteratorStreamer, TextStreamer

from bd3lm_hf import BD3LMGenerationConfig
from bd3lm_hf.modeling.logits_process_bd3lm import NucleusLogitsProcessor
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS


BOS, EOS = 0, 1
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])
NO_CACHE = {"use_cache": False}
CACHES = {
    "none": NO_CACHE,
    "dynamic": {},
    "dynamic-exact": {"window": "exact"},
    "static": {"cache_implementation": "static"},
    "static-exact": {"cache_implementation": "static", "window": "exact"},
}
# (family, sampler, cache and window)
MATRIX = [
    *(("bd3lm", sampler, cache) for sampler in SAMPLERS for cache in CACHES),
    *(("mdlm", sampler, "none") for sampler in SAMPLERS),
    *(("timed", sampler, "none") for sampler in SAMPLERS),
    ("sedd", "analytic", "none"),
    *(("ar", None, cache) for cache in ("none", "dynamic", "dynamic-exact")),
]
NAMES, BY_NAME = ("family", "sampler", "cache"), {"ids": lambda value: value or "greedy"}
EVERY = pytest.mark.parametrize(NAMES, MATRIX, **BY_NAME)
# For what is decided after the network, where the cache makes no difference.
WITH_ONE_CACHE = [case for case in MATRIX if case[2] == ("dynamic" if case[0] in ("bd3lm", "ar") else "none")]
EVERY_SAMPLER = pytest.mark.parametrize(NAMES, WITH_ONE_CACHE, **BY_NAME)
FAMILY = pytest.mark.parametrize("family", FAMILIES)
LENGTHS = {"bd3lm": [1, 4, 13, 16], "timed": [1, 6, 12, 5], "mdlm": [1, 5, 8], "sedd": [1, 5, 8], "ar": [1, 6, 16]}


@pytest.fixture(scope="module")
def models():
    timed = make_family("bd3lm", time_conditioning=True, noise="cosine")
    return {family: make_family(family) for family in FAMILIES} | {"timed": timed}


@pytest.fixture
def model(models):
    return models["bd3lm"]


@pytest.fixture
def speaker(request, tiny_tokenizer):
    """Return a model with the tiny tokenizer's vocabulary; its family can be a parameter."""
    ids = {**special_ids(tiny_tokenizer), "eos_token_id": None}
    return make_family(getattr(request, "param", "bd3lm"), vocab_size=len(tiny_tokenizer), model_length=32, **ids)


def options_of(sampler: str | None, cache: str) -> dict:
    return {**CACHES[cache], **({} if sampler is None else {"sampler": sampler, **FIELDS[sampler]})}


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def seeds(model, rows: list[int]):
    """Return a generator per row, if the family supports them."""
    return {"do_sample": True, "generator": [seed(row) for row in rows]} if model.generator_per_row else {}


# --- The matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "sampler", "cache"), [case for case in MATRIX if case[0] in ("bd3lm", "mdlm")])
def test_greedy_text_is_that_of_a_plain_loop(models, family, sampler, cache):
    # Keys that a moving window keeps differ from recomputed ones: test_windows_bd3lm.py has their reference.
    size, moves = models[family].config.block_size, family == "mdlm" or "exact" in cache or cache == "none"
    for prompt in prompts_of([1, 6, 13 if family == "bd3lm" else 8][: 2 + moves]):
        # To the end of a block, so that the loop's last block is requested in full.
        count = 2 * size - len(prompt) % size if family == "bd3lm" else 13 - len(prompt)
        output = generate(models[family], prompt, max_new_tokens=count, **options_of(sampler, cache))
        expected, steps = plain_loop(models[family], prompt, count, sampler)
        assert new_tokens(output)[0].tolist() == expected
        if family == "bd3lm":  # the last window of masked diffusion is not requested in full
            assert output.num_forward_passes == output.row_forward_passes[0] == steps
            assert output.tokens_per_forward == count / steps


@EVERY
@pytest.mark.parametrize("sampled", [False, True])
def test_a_row_of_a_batch_is_generated_as_if_alone(models, family, sampler, cache, sampled):
    model, options = models[family], options_of(sampler, cache)
    prompts = prompts_of(LENGTHS[family])
    side = "right" if sampled else "left"
    many = seeds(model, range(len(prompts))) if sampled else {}
    output = generate(model, **batch_of(prompts, side), **options, **many)
    assert torch.equal(output.sequences[:, :-11], batch_of(prompts, side)["input_ids"])
    assert not torch.isin(new_tokens(output), torch.tensor([MASK, PAD])).any()
    assert len(new_tokens(output).unique()) > 5
    for row, prompt in enumerate(prompts):
        one = seeds(model, [row]) if sampled else {}
        alone = generate(model, prompt, **options, **one)
        assert torch.equal(new_tokens(alone)[0], new_tokens(output)[row])
        torch.testing.assert_close(output.logits[-1][row], alone.logits[-1][0], atol=1e-4, rtol=0)
        if family != "ar":
            assert output.row_forward_passes[row] == alone.num_forward_passes == alone.row_forward_passes[0]
    if family != "ar":
        assert output.num_forward_passes >= output.row_forward_passes.max()


@pytest.mark.parametrize(
    ("family", "sampler", "cache", "sampled"),
    [*((*case, True) for case in MATRIX), *((*case, False) for case in WITH_ONE_CACHE)],
)
def test_rows_end_at_their_end_token_and_leave_the_others_alone(models, family, sampler, cache, sampled):
    model, options = models[family], options_of(sampler, cache)
    many = lambda: seeds(model, range(6)) if sampled else {}  # noqa: E731
    batch = batch_of(prompts_of([1, 6, 8, 3, 5, 5]))
    plain = new_tokens(generate(model, **batch, max_new_tokens=15, **options, **many()))
    counts = {token: int((plain[:, :11] == token).any(1).sum()) for token in plain.unique().tolist()}
    stop = next(token for token, count in counts.items() if 3 <= count < 6)  # finished rows are dropped
    ends = torch.tensor([stop, 46]) if sampled else [stop, 46]
    output = generate(model, **batch, max_new_tokens=15, eos_token_id=ends, **options, **many())
    for row, text in zip(new_tokens(output).tolist(), plain.tolist(), strict=True):
        end = min((text.index(token) + 1 for token in (stop, 46) if token in text), default=15)
        assert row == (text[:end] + [PAD] * 15)[: len(row)]
    assert len(output.logits) == max((new_tokens(output) != PAD).sum(1))


@EVERY_SAMPLER
def test_a_seed_repeats_a_sample_and_greedy_text_needs_none(models, family, sampler, cache):
    model, options = models[family], options_of(sampler, cache)
    state, texts = torch.get_rng_state(), []
    for value in (3, 3, 4):
        texts.append(generate(model, PROMPT, do_sample=True, generator=seed(value), **options).sequences)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert torch.equal(generate(model, PROMPT, **options).sequences, generate(model, PROMPT, **options).sequences)
    assert torch.equal(torch.get_rng_state(), state)
    texts.clear()
    for value in (0, 0, 1):
        torch.manual_seed(value)
        texts.append(generate(model, PROMPT, do_sample=True, **options).sequences)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@EVERY_SAMPLER
def test_processors_see_the_text_to_the_left_and_constraints_hold(models, family, sampler, cache):
    model, shown = models[family], []
    options = {**options_of(sampler, cache), "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}

    class Witness(LogitsProcessor):
        def __call__(self, input_ids, scores):
            shown.append(input_ids.clone())
            return scores

    prompts = prompts_of([1, 6, 8])
    output = generate(model, **batch_of(prompts), max_new_tokens=14, **options)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, max_new_tokens=14, logits_processor=[Witness()], **options)
        assert torch.equal(new_tokens(alone)[0], new_tokens(output)[row])
        text = alone.sequences[0].tolist()
        pairs = list(zip(text[len(prompt) - 1 :], text[len(prompt) :], strict=False))
        assert len(set(pairs)) == len(pairs)
        # The last context of each length is the text when the token after it was chosen.
        contexts = {context.shape[1]: context for context in shown}
        assert set(range(len(prompt), len(text))) <= set(contexts)
        assert all(torch.equal(contexts[n][0], alone.sequences[0, :n]) for n in range(len(prompt), len(text)))
        assert not any((context[:, len(prompt) :] == MASK).any() for context in shown)
        shown.clear()


@EVERY_SAMPLER
def test_tokens_are_drawn_from_the_returned_scores(models, family, sampler, cache):
    options = {**options_of(sampler, cache), "temperature": 0.5, "do_sample": True, "output_scores": True}
    output = generate(models[family], **batch_of(prompts_of([1, 6])), **options, generator=seed(0))
    assert len(output.scores) == len(output.logits) == 11
    for scores, logits in zip(output.scores, output.logits, strict=True):
        finite = scores.isfinite()
        torch.testing.assert_close(scores[finite], (logits / 0.5)[finite])
    greedy = generate(models[family], PROMPT, **{**options, "do_sample": False, "temperature": None})
    assert torch.equal(torch.stack([scores.argmax(-1) for scores in greedy.scores], dim=1), new_tokens(greedy))
    transition = models[family].compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True)
    assert transition.shape == (1, 11) and (transition <= 0).all() and transition.isfinite().all()


@EVERY_SAMPLER
def test_tokens_are_streamed_once_and_drafts_show_new_ones(models, family, sampler, cache):
    streamer = Recorder()
    output = generate(models[family], PROMPT, max_new_tokens=14, streamer=streamer, **options_of(sampler, cache))
    text = output.sequences[0].tolist()
    assert streamer.puts[0] == PROMPT[0].tolist() and sum(streamer.puts, []) == text and streamer.ended
    if family == "bd3lm":
        assert streamer.puts[1:] == [text[6:8], text[8:12], text[12:16], text[16:20]]
    for shown, draft in streamer.drafts:
        if sampler == "first_hitting":  # greedily from left to right
            assert draft == text[shown : shown + len(draft)]
        assert len(draft) <= (2 if family in ("mdlm", "sedd") and shown == 6 else 4)
    assert bool(streamer.drafts) == (family != "ar")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_time_conditioned_model_remasks_and_has_no_cache(models, sampler):
    options = {"sampler": sampler, **FIELDS[sampler], "do_sample": True, "remask_fraction": 0.5}
    output = generate(models["timed"], PROMPT, **options)
    assert output.past_key_values is None and not torch.isin(new_tokens(output), torch.tensor([MASK, PAD])).any()
    cache = models["timed"](PROMPT[:, :4], use_cache=True, timesteps=torch.ones(1)).past_key_values
    with pytest.raises(ValueError, match="past_key_values.*time_conditioning=True"):
        generate(models["timed"], PROMPT, past_key_values=cache)


# --- Lengths and prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_block_sizes_and_attention_implementations_give_the_same_text(block_size, implementation, interpreted):
    model, batch = make_family("bd3lm", block_size=block_size, model_length=32), batch_of(prompts_of([1, 6, 13]))
    expected = generate(model, **batch, use_cache=False)
    model.set_attn_implementation(implementation)
    for cache in CACHES.values():
        assert_same(generate(model, **batch, **cache), expected)


@FAMILY
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_as_many_tokens_are_generated_as_requested(models, family, count):
    batch = batch_of(prompts_of([1, 3, 6]))
    output = models[family].generate(**batch, max_new_tokens=count, do_sample=True)
    assert output.shape == (3, 6 + count) and torch.equal(output[:, :6], batch["input_ids"])
    longer = new_tokens(generate(models[family], PROMPT))
    assert torch.equal(new_tokens(generate(models[family], PROMPT, max_new_tokens=count)), longer[:, :count])
    assert models[family].generate(PROMPT, max_length=6 + count).shape == (1, 6 + count)


def test_without_a_prompt_the_text_begins_with_bos(model):
    output = model.generate(max_new_tokens=7)
    assert torch.equal(output, model.generate(torch.tensor([[BOS]]), max_new_tokens=7)) and output.shape == (1, 8)
    with pytest.raises(ValueError, match="bos_token_id"):
        make_family("bd3lm", bos_token_id=None).generate(max_new_tokens=4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, None])
def test_an_attention_mask_can_have_any_type_and_is_inferred_if_missing(model, dtype):
    batch = batch_of(prompts_of([1, 6]))
    mask = None if dtype is None else batch["attention_mask"].to(dtype)
    expected = model.generate(**batch, max_new_tokens=5)
    assert torch.equal(model.generate(batch["input_ids"], attention_mask=mask, max_new_tokens=5), expected)


@FAMILY
def test_only_the_attention_mask_identifies_padding_that_is_the_mask_token(models, family):
    model, batch = make_family(family, pad_token_id=MASK), batch_of(prompts_of([1, 6]))
    padded = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, MASK)
    output = model.generate(padded, attention_mask=batch["attention_mask"], max_new_tokens=5, pad_token_id=MASK)
    for row, prompt in enumerate(prompts_of([1, 6])):
        assert torch.equal(output[row, -5:], model.generate(prompt[None], max_new_tokens=5, pad_token_id=MASK)[0, -5:])
    with pytest.raises(ValueError, match=f"mask_token_id={MASK}"):
        model.generate(padded, max_new_tokens=5)


def test_several_samples_of_one_prompt_differ_and_token_types_are_ignored(model):
    batch = batch_of(prompts_of([1, 3, 6]))
    arguments = {"do_sample": True, "num_return_sequences": 3, "generator": seed(0)}
    output = model.generate(**batch, max_new_tokens=9, token_type_ids=torch.zeros(3, 6), **arguments)
    assert torch.equal(output[:, :6], batch["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in output[:, 6:].tolist()}) == 9
    nll = model.token_nll(**batch, token_type_ids=torch.zeros(3, 6), estimator="exact").nll
    assert torch.equal(nll, model.token_nll(**batch, estimator="exact").nll)


@pytest.mark.parametrize("pad", [PAD, EOS, None])
def test_mask_and_padding_are_never_generated(pad):
    model = make_family("bd3lm", eos_token_id=EOS, pad_token_id=pad)
    with torch.no_grad():
        model.get_output_embeddings().bias[[MASK, PAD]] = 20.0
    output = new_tokens(generate(model, PROMPT, do_sample=True, generator=seed(0), max_new_tokens=24))
    assert not (output == MASK).any() and (output == PAD).any() == (pad != PAD)


# --- Processors and ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
        {"top_k": 3, "top_p": 0.5, "min_p": 0.2, "remove_invalid_values": True},
        {"bad_words_ids": [[5], [6, 7]], "sequence_bias": {(5,): 2.0}},
        {"min_length": 9, "eos_token_id": EOS, "exponential_decay_length_penalty": (2, 1.5)},
        {"suppress_tokens": list(range(3, 20)), "begin_suppress_tokens": [25]},
        {"renormalize_logits": True, "nucleus_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("sampled", [True, False])
def test_standard_processors_work_on_rows_of_unequal_length(model, arguments, sampled):
    arguments = {**arguments, "do_sample": sampled, "generator": seed(0), "max_new_tokens": 9}
    output = model.generate(**batch_of(prompts_of([1, 4, 6])), **arguments)[:, 6:]
    assert output.shape[0] == 3 and output.shape[1] <= 9 and not (output == MASK).any()
    if "suppress_tokens" in arguments:
        assert not torch.isin(output, torch.tensor(arguments["suppress_tokens"])).any()
        assert not (output[:, 0] == 25).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sampled", [True, False])
def test_a_constraint_of_a_row_holds_for_every_sampler(models, sampler, sampled):
    ids, shown = prompts_of([6])[0].expand(3, -1), []
    options = {"sampler": sampler, **FIELDS[sampler], "do_sample": sampled, "generator": seed(0), "max_new_tokens": 16}

    def allowed(row: int, prefix: torch.Tensor) -> list[int]:
        shown.append(prefix[6:])
        return [10 + row + len(prefix) % 2]

    text = new_tokens(generate(models["bd3lm"], ids, prefix_allowed_tokens_fn=allowed, **options))
    assert text.tolist() == [[10 + row + column % 2 for column in range(6, 22)] for row in range(3)]
    assert not any((prefix == MASK).any() for prefix in shown)


@pytest.mark.parametrize("sampled", [True, False])
def test_min_new_tokens_and_forced_ends_are_exact_for_every_row(sampled):
    model, batch = make_family("bd3lm", eos_token_id=EOS), batch_of(prompts_of([1, 4, 6]))
    forced = generate(make_family("bd3lm"), **batch, forced_eos_token_id=EOS, do_sample=sampled)
    assert new_tokens(forced)[:, -1].tolist() == [EOS] * 3
    with torch.no_grad():
        model.get_output_embeddings().bias[EOS] = 30.0
    output = new_tokens(generate(model, **batch, min_new_tokens=5, do_sample=sampled))
    assert ((output == EOS).long().argmax(1) == 5).all() and output.shape[1] == 6
    same = make_family("bd3lm", eos_token_id=EOS, pad_token_id=EOS)
    with torch.no_grad():
        same.get_output_embeddings().bias[EOS] = 30.0
    assert new_tokens(generate(same, PROMPT)).tolist() == [[EOS]]  # padding that is also the end token ends a text


@FAMILY
def test_a_repetition_penalty_sees_padding_on_neither_side(family):
    model = make_family(family, eos_token_id=EOS, pad_token_id=EOS)
    options = {"repetition_penalty": 3.0, "output_scores": True, "max_new_tokens": 2}
    left, right = batch_of(prompts_of([2, 6])), batch_of(prompts_of([2, 6]), "right")
    padding = lambda batch: batch["input_ids"].masked_fill(batch["attention_mask"] == 0, EOS)  # noqa: E731
    first, second = (generate(model, **{**batch, "input_ids": padding(batch)}, **options) for batch in (left, right))
    assert torch.equal(first.scores[0], second.scores[0])


@pytest.mark.parametrize("speaker", ["bd3lm", "ar"], indirect=True)
def test_stop_strings_end_each_row_at_the_token_that_completes_them(speaker, tiny_tokenizer):
    tiny_tokenizer.padding_side = "left"
    batch = dict(tiny_tokenizer(["A block", "The quick brown"], return_tensors="pt", padding=True))
    batch.pop("token_type_ids", None)
    # Without an end token, transformers' loop would not pad a row after its stop string.
    arguments = {"max_new_tokens": 20, "repetition_penalty": 9.0, "eos_token_id": 1, **batch}
    plain = new_tokens(generate(speaker, **arguments))
    stop = next(c for c in tiny_tokenizer.decode(plain[0, 3:]) if c.isascii() and c.isalnum())
    output = new_tokens(generate(speaker, **arguments, stop_strings=[stop], tokenizer=tiny_tokenizer))
    ends = []
    for row, whole in zip(output.tolist(), plain.tolist(), strict=True):
        ends.append(next((k for k in range(1, 21) if stop in tiny_tokenizer.decode(whole[:k])), 20))
        assert row == (whole[: ends[-1]] + [tiny_tokenizer.pad_token_id] * 20)[: len(row)]
    assert min(ends) < 20


def test_max_time_keeps_the_finished_block(model):
    output = generate(model, PROMPT, max_new_tokens=24, max_time=1e-6)
    assert torch.equal(output.sequences, generate(model, PROMPT, max_new_tokens=2).sequences)


def test_the_nucleus_comes_last_except_for_normalisation(model):
    config = model._prepare_generation_config(None, do_sample=True, temperature=0.5, nucleus_p=0.9)[0]
    assert isinstance(model._get_logits_processor(config, 1)[-1], NucleusLogitsProcessor)
    config.renormalize_logits = True
    assert isinstance(model._get_logits_processor(config, 1)[-2], NucleusLogitsProcessor)


@pytest.mark.parametrize(("family", "nucleus_p"), [("mdlm", 0.2), ("sedd", 0.2), ("sedd", 0.99)])
def test_a_nucleus_yields_to_constraints(models, family, nucleus_p):
    options = {"do_sample": True, "prefix_allowed_tokens_fn": lambda row, ids: [11, 12, 13]}
    output = generate(models[family], PROMPT, nucleus_p=nucleus_p, **options)
    assert torch.isin(new_tokens(output), torch.tensor([11, 12, 13])).all()


# --- Streamers of transformers ---------------------------------------------------------------------------------------


def test_streamed_text_is_the_decoded_result(speaker, tiny_tokenizer, capsys):
    ids = tiny_tokenizer("A block", return_tensors="pt").input_ids
    arguments = {"max_new_tokens": 15, "do_sample": True}
    output = speaker.generate(ids, generator=seed(0), streamer=TextStreamer(tiny_tokenizer), **arguments)
    assert capsys.readouterr().out == tiny_tokenizer.decode(output[0]) + "\n"
    streamer, result = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=60), {}
    work = lambda: result.update(ids=speaker.generate(ids, streamer=streamer, **arguments))  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tiny_tokenizer.decode(result["ids"][0, ids.shape[1] :]) and len(pieces) > 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_terminal_shows_drafts_and_ends_with_the_text(speaker, tiny_tokenizer, capsys, sampler):
    if not hasattr(streamers, "TextDiffusionStreamer"):
        pytest.skip("this transformers has no TextDiffusionStreamer")
    ids = tiny_tokenizer("A block", return_tensors="pt").input_ids
    streamer = streamers.TextDiffusionStreamer(tiny_tokenizer)
    output = generate(speaker, ids, max_new_tokens=15, sampler=sampler, streamer=streamer)
    printed = capsys.readouterr().out
    save, draft, restore = "\x1b7", r"\x1b\[33m(.*?)\x1b\[0m", "\x1b8\x1b[J"
    assert printed.count(save) == printed.count(restore) == len(re.findall(draft, printed, re.DOTALL))
    assert printed.count(save) == output.num_forward_passes
    # What a terminal shows in the end: each draft is erased before anything else is printed.
    shown = re.sub(f"{save}{draft}{re.escape(restore)}", "", printed, flags=re.DOTALL)
    assert shown == tiny_tokenizer.decode(output.sequences[0]) + "\n"


def test_drafts_stop_when_the_first_row_has_ended(model):
    streamer, batch = Recorder(), batch_of(prompts_of([1, 4, 6]))
    plain = new_tokens(generate(model, **batch, max_new_tokens=16))
    stop = next(token for token in plain[0].tolist() if token not in plain[1:])
    generate(model, **batch, max_new_tokens=16, eos_token_id=stop, streamer=streamer)
    end = plain[0].tolist().index(stop) + 1
    assert sum(streamer.puts[1:], []) == plain[0, :end].tolist() and streamer.ended
    # Its prompt is one token, so the blocks up to the one with its end hold this many new tokens.
    assert len(streamer.drafts) == -(-(end + 1) // 4) * 4 - 1


# --- The generation config -------------------------------------------------------------------------------------------


@FAMILY
def test_a_plain_config_can_be_assigned_passed_and_saved(models, family, tmp_path):
    model = make_family(family)
    expected = model.generate(PROMPT, max_new_tokens=5)
    for made in (GenerationConfig(max_new_tokens=5), GenerationConfig.from_dict({"max_new_tokens": 5})):
        model.generation_config = made
        assert torch.equal(model.generate(PROMPT), expected)
        assert torch.equal(make_family(family).generate(PROMPT, generation_config=made), expected)
    assert model.generation_config.sampler == ("analytic" if family == "sedd" else "first_hitting")
    model.generation_config.nucleus_p = 0.8
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).generation_config.nucleus_p == 0.8
    (tmp_path / "generation_config.json").unlink()
    loaded = type(model).from_pretrained(tmp_path)
    assert (loaded.generation_config.pad_token_id, loaded.generation_config.nucleus_p) == (PAD, 1.0)
    loaded.save_pretrained(tmp_path / "again")  # one made from config.json would lose our fields
    again = type(model).from_pretrained(tmp_path / "again").generation_config
    assert again.sampler == loaded.generation_config.sampler


def test_unknown_fields_of_a_config_are_refused_by_name(model):
    misspelt = GenerationConfig(num_denoising_step=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="num_denoising_step"):
        model.generate(PROMPT, generation_config=misspelt)
    with pytest.raises(ValueError, match="num_denoising_step"):
        make_family("bd3lm").generation_config = misspelt
    known = BD3LMGenerationConfig(max_new_tokens=11, do_sample=True, nucleus_p=1e-6, repetition_penalty=1.0001)
    assert torch.equal(model.generate(PROMPT, generation_config=known), generate(model, PROMPT).sequences)


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "only supports .*BEAM_SEARCH"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha=0.5"),
        ({"max_new_tokenz": 3, "nucleus": 0.9}, "max_new_tokenz.*nucleus"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"synced_gpus": True}, "synced_gpus=True"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"labels": PROMPT}, "labels"),
        ({"clean_input_ids": PROMPT, "timesteps": torch.ones(1)}, "clean_input_ids, timesteps"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.zeros_like(PROMPT)}, "empty prompt"),
        # One row of several.
        ({"input_ids": PROMPT.repeat(2, 1), "attention_mask": torch.tensor([[1], [0]]).expand(2, 6)}, "empty prompt"),
        ({"attention_mask": torch.tensor([[0, 1]])}, r"attention_mask of shape \(1, 2\)"),
        ({"num_denoising_steps": 10**24}, f"num_denoising_steps={10**24}"),
        ({"max_new_tokens": 10**15}, f"max_new_tokens={10**15}"),
        ({"window_stride": 3}, "window_stride=3.*blocks of 4"),
        ({"sampler": "analytic"}, "sampler='analytic'.*BD3LMForMaskedLM.*'first_hitting'"),
        ({"output_trace": True}, "output_trace=True.*return_dict_in_generate=True"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 rows"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, "empty prompt"),
        ({"input_ids": torch.tensor([[5, 48]])}, "id 48.*48 ids"),
        ({"input_ids": torch.tensor([[5, -1]])}, "id -1"),
        ({"input_ids": torch.tensor([[5, MASK]])}, f"mask_token_id={MASK}.*infill"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_arguments_that_cannot_work_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": PROMPT, "max_new_tokens": 4, **arguments})


@pytest.mark.parametrize("family", ["mdlm", "sedd"])
def test_what_does_not_fit_a_single_window_is_refused(models, family):
    for stride, message in ((9, "window_stride=9.*model_length=8"), (0, "window_stride=0")):
        with pytest.raises(ValueError, match=message):
            generate(models[family], PROMPT, window_stride=stride)
    other = "analytic" if family == "mdlm" else "first_hitting"
    with pytest.raises(ValueError, match=f"sampler='{other}'.*{type(models[family]).__name__}"):
        generate(models[family], PROMPT, sampler=other)


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="generate_batch"):
        model.generate_batch([[5, 6]])


@pytest.mark.parametrize(
    ("family", "left_out", "window"),
    [
        ("bd3lm", 16, {"window": "exact"}),
        ("bd3lm", 16, {"window": "cached"}),  # whose keys would contain more, if more were read
        ("mdlm", 16, {}),
        ("sedd", 16, {}),
        ("ar", 15, {"window": "exact"}),
    ],
)
def test_only_the_end_of_a_prompt_beyond_the_window_is_read(models, family, left_out, window):
    model, options = models[family], {"max_new_tokens": 6, **window}
    long, short = prompts_of([model.config.model_length + 15, 3], seed=1)
    output = generate(model, long, **options)
    assert torch.equal(output.sequences[0, : len(long)], long)
    assert_same(output, generate(model, long[left_out:], **options))
    # Next to a short prompt, each row is the same as alone.
    both = generate(model, **batch_of([long, short]), **options)
    assert torch.equal(both.sequences[0], output.sequences[0])
    assert torch.equal(new_tokens(both)[1], new_tokens(generate(model, short, **options))[0])
