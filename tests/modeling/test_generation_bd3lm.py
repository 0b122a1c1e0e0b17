"""`generate` is transformers' own: lengths, seeds, processors, stop rules, streamers, and clear refusals."""

import asyncio
import collections
import re
import threading

import pytest
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
    TextStreamer,
)

from bd3lm_hf.modeling.cache_bd3lm import BlockCache
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig
from bd3lm_hf.modeling.logits_process_bd3lm import NucleusLogitsProcessor
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS


BOS, EOS, PAD, MASK = 0, 1, 2, 47
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])
RAGGED = torch.tensor([[2, 2, 2, 2, 2, 9], [2, 2, 11, 12, 13, 14], [3, 4, 5, 6, 7, 8]])
RAGGED_MASK = (RAGGED != PAD).long()


@pytest.fixture
def make_model(tiny_config, randomize):
    """A function `(**config fields) -> model` without an end token, whose distributions are broad."""

    def make(**fields) -> BD3LMForMaskedLM:
        known = {"eos_token_id": None, "mask_token_id": None}
        return randomize(BD3LMForMaskedLM(BD3LMConfig(**{**tiny_config.to_diff_dict(), **known, **fields}))).eval()

    return make


@pytest.fixture
def model(make_model) -> BD3LMForMaskedLM:
    return make_model()


@pytest.fixture
def speaker(make_model, tiny_tokenizer) -> BD3LMForMaskedLM:
    """A model that reads and writes the text of the tiny tokenizer."""
    ids = {name: getattr(tiny_tokenizer, name) for name in ("bos_token_id", "pad_token_id", "mask_token_id")}
    return make_model(vocab_size=len(tiny_tokenizer), **ids)


def written(model, prompt=PROMPT, **arguments) -> torch.Tensor:
    """The new tokens."""
    return model.generate(prompt, **{"max_new_tokens": 9, "do_sample": False, **arguments})[:, prompt.shape[1] :]


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


# --- Lengths and prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("count", range(1, 10))
def test_exactly_as_many_tokens_are_written_as_were_asked_for(model, count, sampled):
    output = model.generate(RAGGED, attention_mask=RAGGED_MASK, max_new_tokens=count, do_sample=sampled)
    assert torch.equal(output[:, :6], RAGGED)
    assert output.shape == (3, 6 + count)
    assert not torch.isin(output[:, 6:], torch.tensor([MASK, PAD])).any()


def test_max_length_counts_the_prompt(model):
    assert model.generate(PROMPT, max_length=11).shape == (1, 11)


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_a_shorter_greedy_text_is_the_beginning_of_a_longer_one(model, count):
    assert torch.equal(written(model, max_new_tokens=count), written(model)[:, :count])


def test_without_a_prompt_the_text_begins_with_bos(model):
    output = model.generate(max_new_tokens=7)
    assert output.shape == (1, 8) and output[0, 0] == BOS
    assert torch.equal(output, model.generate(torch.tensor([[BOS]]), max_new_tokens=7))


def test_padding_is_inferred_where_no_mask_is_given(model):
    masked = written(model, RAGGED, attention_mask=RAGGED_MASK)
    assert torch.equal(written(model, RAGGED), masked)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_an_attention_mask_of_any_type_is_understood(model, dtype):
    expected = written(model, RAGGED, attention_mask=RAGGED_MASK)
    assert torch.equal(written(model, RAGGED, attention_mask=RAGGED_MASK.to(dtype)), expected)


def test_token_types_are_nothing_to_this_model(model):
    assert torch.equal(written(model, token_type_ids=torch.zeros_like(PROMPT)), written(model))


# --- Chance ----------------------------------------------------------------------------------------------------------


def test_greedy_text_repeats_itself_whatever_the_seed(model):
    texts = []
    for value in (0, 1):
        torch.manual_seed(value)
        state = torch.get_rng_state()
        texts.append(written(model))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*texts)


def test_samples_follow_the_global_seed(model):
    texts = []
    for value in (0, 0, 1):
        torch.manual_seed(value)
        texts.append(written(model, do_sample=True))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_samples_follow_their_generator_alone(model):
    state = torch.get_rng_state()
    first, second, other = (written(model, do_sample=True, generator=seed(value)) for value in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_several_samples_of_one_prompt_differ(model):
    output = model.generate(
        RAGGED, attention_mask=RAGGED_MASK, max_new_tokens=9, do_sample=True, num_return_sequences=3, generator=seed(0)
    )
    assert torch.equal(output[:, :6], RAGGED.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in output[:, 6:].tolist()}) == 9


# --- What is never written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [PAD, EOS, None])
def test_mask_and_padding_are_never_written(make_model, pad):
    model = make_model(eos_token_id=EOS, pad_token_id=pad)
    with torch.no_grad():
        # All that the model wants to write is the mask and token 2.
        model.get_output_embeddings().bias[[MASK, PAD]] = 20.0
    output = written(model, do_sample=True, generator=seed(0), max_new_tokens=24)
    assert not (output == MASK).any()
    assert (output == PAD).any() == (pad != PAD)


def test_padding_that_is_also_the_end_token_ends_a_text(make_model):
    model = make_model(eos_token_id=EOS, pad_token_id=EOS)
    with torch.no_grad():
        model.get_output_embeddings().bias[EOS] = 20.0
    assert written(model).tolist() == [[EOS]]


# --- Ends ------------------------------------------------------------------------------------------------------------


def test_a_row_ends_at_its_end_token_and_the_others_go_on(model):
    plain = written(model, RAGGED, attention_mask=RAGGED_MASK, do_sample=True, generator=seed(1), max_new_tokens=20)
    stop = int(plain[0, 5])
    output = written(
        model,
        RAGGED,
        attention_mask=RAGGED_MASK,
        do_sample=True,
        generator=seed(1),
        max_new_tokens=20,
        eos_token_id=[stop, 46],
    )
    ended = False
    for row, text in zip(output.tolist(), plain.tolist(), strict=True):
        ends = [i + 1 for i, token in enumerate(text) if token in (stop, 46)]
        if ends:
            ended = True
            text[ends[0] :] = [PAD] * (20 - ends[0])
            assert row == text[: len(row)]
        assert (PAD in row) == bool(ends and ends[0] < len(row))
    assert ended


def test_a_greedy_row_is_cut_without_a_trace_in_the_others(model):
    plain = written(model, RAGGED, attention_mask=RAGGED_MASK, max_new_tokens=12)
    stop = int(plain[1, 2])
    expected = plain.clone()
    for row in expected:
        ends = (row == stop).nonzero().flatten().tolist()
        if ends:
            row[ends[0] + 1 :] = PAD
    output = written(model, RAGGED, attention_mask=RAGGED_MASK, max_new_tokens=12, eos_token_id=stop)
    assert torch.equal(output, expected[:, : output.shape[1]])
    assert (expected[:, output.shape[1] :] == PAD).all()


def test_stop_strings_end_each_row(speaker, tiny_tokenizer):
    tiny_tokenizer.padding_side = "left"
    batch = tiny_tokenizer(["A block", "The quick brown"], return_tensors="pt", padding=True)
    width = batch["input_ids"].shape[1]
    arguments = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": 9.0, **batch}
    plain = speaker.generate(**arguments)[:, width:]
    stop = next(c for c in tiny_tokenizer.decode(plain[0, 3:]) if c.isascii() and c.isalnum())
    output = speaker.generate(**arguments, stop_strings=[stop], tokenizer=tiny_tokenizer)[:, width:]
    cut = False
    for row, whole in zip(output.tolist(), plain.tolist(), strict=True):
        # Up to and with the token that completes the string.
        end = next((k for k in range(1, 21) if stop in tiny_tokenizer.decode(whole[:k])), 20)
        expected = whole[:end] + [tiny_tokenizer.pad_token_id] * 20
        assert row == expected[: len(row)]
        cut |= end < 20
    assert cut


def test_a_mask_id_behind_the_tokenizer_does_not_disturb_stop_strings(make_model, tiny_tokenizer):
    model = make_model(vocab_size=len(tiny_tokenizer) + 1, block_size=8)
    ids = torch.tensor([tiny_tokenizer("A block").input_ids] * 2)
    output = model.generate(
        ids, max_new_tokens=9, do_sample=True, stop_strings=["q"], tokenizer=tiny_tokenizer, pad_token_id=PAD
    )
    assert output.shape[1] <= ids.shape[1] + 9


def test_max_time_keeps_the_block_that_was_written(model):
    output = written(model, max_new_tokens=24, max_time=1e-6)
    assert torch.equal(output, written(model, max_new_tokens=2))


# --- Logits processors -----------------------------------------------------------------------------------------------


class Forbids(LogitsProcessor):
    """Rules out all even ids."""

    def __call__(self, input_ids, scores):
        scores[:, ::2] = -torch.inf
        return scores


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.02},
        {"nucleus_p": 0.5},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"min_new_tokens": 5, "eos_token_id": EOS},
        {"min_length": 9, "eos_token_id": EOS},
        {"suppress_tokens": list(range(3, 20))},
        {"begin_suppress_tokens": [5]},
        {"forced_eos_token_id": EOS},
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": EOS},
        {"sequence_bias": {(5,): 2.0}},
        {"renormalize_logits": True, "nucleus_p": 0.9},
        {"remove_invalid_values": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
@pytest.mark.parametrize("sampled", [True, False])
def test_a_standard_processor_serves_ragged_rows(model, arguments, sampled):
    output = model.generate(
        RAGGED, attention_mask=RAGGED_MASK, max_new_tokens=9, do_sample=sampled, generator=seed(0), **arguments
    )
    assert output.shape[0] == 3 and output.shape[1] <= 15
    assert not (output[:, 6:] == MASK).any()


def test_little_chance_left_is_greedy(model):
    for sharp in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}, {"nucleus_p": 1e-6}, {"min_p": 1.0}):
        # A processor that reads the text makes sampling go from left to right, as greedy decoding does.
        output = written(model, do_sample=True, logits_processor=LogitsProcessorList([lambda ids, x: x]), **sharp)
        assert torch.equal(output, written(model)), sharp


def test_sampling_draws_from_the_whole_distribution_by_default(model):
    ids = PROMPT.expand(400, -1)
    output = written(model, ids, do_sample=True, generator=seed(0), max_new_tokens=1, temperature=100.0)
    # Of 46 almost equally likely tokens hardly one is missing among 400; a silent top_k is refused elsewhere.
    assert len(output.unique()) > 42
    assert len(written(model, ids, do_sample=True, generator=seed(0), max_new_tokens=4, top_k=2)[:, :1].unique()) <= 48
    vocab = 200
    wide = type(model)(BD3LMConfig(vocab_size=vocab, model_length=32, hidden_dim=8, n_blocks=1, n_heads=1, cond_dim=4))
    output = wide.eval().generate(torch.ones(4000, 1, dtype=torch.long), max_new_tokens=1, do_sample=True)
    assert len(output[:, 1].unique()) > 190  # uniform over 199, not 50


@pytest.mark.parametrize("sampled", [True, False])
def test_no_bigram_is_repeated(make_model, sampled):
    model = make_model(block_size=8)
    output = written(model, max_new_tokens=24, no_repeat_ngram_size=2, do_sample=sampled, generator=seed(0), top_k=2)[
        0
    ].tolist()
    text = PROMPT[0].tolist() + output
    bigrams = list(zip(text, text[1:], strict=False))
    assert len(set(bigrams)) == len(bigrams)


@pytest.mark.parametrize("sampled", [True, False])
def test_bad_words_never_occur(make_model, sampled):
    model = make_model(block_size=8)
    ids = PROMPT.expand(16, -1)
    arguments = {"max_new_tokens": 24, "do_sample": sampled, "top_k": 3}
    plain = written(model, ids, generator=seed(0), **arguments)
    pairs = collections.Counter(pair for row in plain.tolist() for pair in zip(row, row[1:], strict=False))
    (first, second), _ = pairs.most_common(1)[0]
    word = next(token for token in range(3, 47) if token not in (first, second))
    output = written(model, ids, generator=seed(0), bad_words_ids=[[first, second], [word]], **arguments)
    assert (output == first).any() and not (output == word).any()
    assert (first, second) not in {pair for row in output.tolist() for pair in zip(row, row[1:], strict=False)}


@pytest.mark.parametrize("sampled", [True, False])
def test_min_new_tokens_is_exact_for_every_row(make_model, sampled):
    model = make_model(eos_token_id=EOS)
    with torch.no_grad():
        model.get_output_embeddings().bias[EOS] = 30.0
    output = written(model, RAGGED, attention_mask=RAGGED_MASK, min_new_tokens=5, do_sample=sampled)
    assert ((output == EOS).long().argmax(1) == 5).all() and output.shape[1] == 6


@pytest.mark.parametrize("sampled", [True, False])
def test_the_last_token_can_be_forced_to_end(model, sampled):
    output = written(model, RAGGED, attention_mask=RAGGED_MASK, forced_eos_token_id=EOS, do_sample=sampled)
    assert output[:, -1].tolist() == [EOS] * 3


@pytest.mark.parametrize("sampled", [True, False])
def test_a_custom_processor_forbids_tokens(model, sampled):
    output = written(model, RAGGED, attention_mask=RAGGED_MASK, logits_processor=[Forbids()], do_sample=sampled)
    assert (output % 2 == 1).all()


@pytest.mark.parametrize("sampled", [True, False])
def test_each_row_keeps_to_its_allowed_prefix(model, sampled):
    shown = []

    def allowed(row: int, prefix: torch.Tensor) -> list[int]:
        shown.append(prefix[6:])
        return [10 * (row + 1) + len(prefix) % 2]

    output = written(model, RAGGED, attention_mask=RAGGED_MASK, prefix_allowed_tokens_fn=allowed, do_sample=sampled)
    assert output.tolist() == [[10 * (row + 1) + column % 2 for column in range(6, 15)] for row in range(3)]
    assert not any((prefix == MASK).any() for prefix in shown)


def test_scores_are_processed_logits_and_give_transition_scores(model):
    output = model.generate(
        RAGGED,
        attention_mask=RAGGED_MASK,
        max_new_tokens=6,
        do_sample=True,
        temperature=0.5,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert len(output.scores) == len(output.logits) == 6
    for scores, logits in zip(output.scores, output.logits, strict=True):
        assert scores.shape == (3, 48)
        torch.testing.assert_close(scores, logits / 0.5)
    transition = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert transition.shape == (3, 6) and (transition <= 0).all() and transition.isfinite().all()


def test_the_nucleus_comes_last_but_for_normalization(model):
    config = model._prepare_generation_config(None, do_sample=True, temperature=0.5, nucleus_p=0.9)[0]
    assert isinstance(model._get_logits_processor(config, 1)[-1], NucleusLogitsProcessor)
    config.renormalize_logits = True
    assert isinstance(model._get_logits_processor(config, 1)[-2], NucleusLogitsProcessor)


# --- Streamers -------------------------------------------------------------------------------------------------------


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.drafts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def put_draft(self, value: torch.Tensor) -> None:
        self.drafts.append(value.tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("sampled", [True, False])
def test_tokens_are_streamed_block_by_block(model, sampled):
    streamer = Recorder()
    output = written(model, streamer=streamer, do_sample=sampled)[0].tolist()
    assert streamer.puts == [PROMPT[0].tolist(), output[:2], output[2:6], output[6:9]]
    assert streamer.ended


def test_drafts_show_what_is_revealed_of_the_block(model):
    streamer = Recorder()
    output = written(model, streamer=streamer)[0].tolist()
    starts = [0, 0, 2, 2, 2, 2, 6, 6, 6]
    assert streamer.drafts == [output[start : end + 1] for end, start in enumerate(starts)]


def test_a_stream_ends_with_the_end_token(model):
    stop = int(written(model)[0, 3])
    end = written(model)[0].tolist().index(stop) + 1
    streamer = Recorder()
    written(model, streamer=streamer, eos_token_id=stop)
    assert sum(streamer.puts[1:], []) == written(model)[0, :end].tolist()
    assert streamer.ended


def test_printed_text_is_the_decoded_result(speaker, tiny_tokenizer, capsys):
    ids = tiny_tokenizer("A block", return_tensors="pt").input_ids
    output = speaker.generate(
        ids, max_new_tokens=15, do_sample=True, generator=seed(0), streamer=TextStreamer(tiny_tokenizer)
    )
    assert capsys.readouterr().out == tiny_tokenizer.decode(output[0]) + "\n"


def test_text_arrives_while_it_is_written(speaker, tiny_tokenizer):
    ids = tiny_tokenizer("A block", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=60)
    result = {}
    thread = threading.Thread(
        target=lambda: result.update(ids=speaker.generate(ids, max_new_tokens=15, do_sample=True, streamer=streamer))
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tiny_tokenizer.decode(result["ids"][0, ids.shape[1] :])
    assert len(pieces) > 2


def test_text_arrives_in_an_event_loop(speaker, tiny_tokenizer):
    ids = tiny_tokenizer("A block", return_tensors="pt").input_ids

    async def listen() -> tuple[list[str], torch.Tensor]:
        streamer = AsyncTextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=60)
        writing = asyncio.to_thread(speaker.generate, ids, max_new_tokens=15, do_sample=True, streamer=streamer)
        task = asyncio.create_task(writing)
        return [piece async for piece in streamer], await task

    pieces, output = asyncio.run(listen())
    assert "".join(pieces) == tiny_tokenizer.decode(output[0, ids.shape[1] :])
    assert len(pieces) > 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_terminal_shows_drafts_in_yellow_and_ends_with_the_text(speaker, tiny_tokenizer, capsys, sampler):
    streamers = pytest.importorskip("transformers.generation.streamers")
    if not hasattr(streamers, "TextDiffusionStreamer"):
        pytest.skip("this transformers has no TextDiffusionStreamer")
    ids = tiny_tokenizer("A block", return_tensors="pt").input_ids
    output = speaker.generate(
        ids,
        max_new_tokens=15,
        do_sample=True,
        generator=seed(0),
        sampler=sampler,
        return_dict_in_generate=True,
        streamer=streamers.TextDiffusionStreamer(tiny_tokenizer),
    )
    printed = capsys.readouterr().out
    save, draft, restore = "\x1b7", r"\x1b\[33m(.*?)\x1b\[0m", "\x1b8\x1b[J"
    assert printed.count(save) == printed.count(restore) == len(re.findall(draft, printed, re.DOTALL))
    assert printed.count(save) == output.num_forward_passes
    # What a terminal shows in the end: each draft is wiped out before anything else is printed.
    shown = re.sub(f"{save}{draft}{re.escape(restore)}", "", printed, flags=re.DOTALL)
    assert shown == tiny_tokenizer.decode(output.sequences[0]) + "\n"


def test_drafts_stop_when_the_first_row_has_ended(model):
    streamer = Recorder()
    plain = model.generate(RAGGED, attention_mask=RAGGED_MASK, max_new_tokens=16, do_sample=False)[:, 6:]
    stop = next(token for token in plain[0].tolist() if token not in plain[1:])
    model.generate(
        RAGGED, attention_mask=RAGGED_MASK, max_new_tokens=16, do_sample=False, eos_token_id=stop, streamer=streamer
    )
    end = plain[0].tolist().index(stop) + 1
    assert sum(streamer.puts[1:], []) == plain[0, :end].tolist()
    # Its prompt is one token, so that the blocks of 4 up to that of its end hold so many new ones.
    assert len(streamer.drafts) == -(-(end + 1) // 4) * 4 - 1 and streamer.ended


# --- The generation config -------------------------------------------------------------------------------------------


def test_our_fields_have_the_defaults_of_the_paper(model):
    config = model.generation_config
    assert isinstance(config, BD3LMGenerationConfig)
    assert (config.sampler, config.nucleus_p) == ("first_hitting", 1.0)
    assert (config.bos_token_id, config.pad_token_id) == (BOS, PAD)
    assert model._prepare_generation_config(None, do_sample=True)[0].top_k == 0
    assert model._prepare_generation_config(GenerationConfig(do_sample=True))[0].top_k == 0
    assert model._prepare_generation_config(None, do_sample=True, top_k=7)[0].top_k == 7
    assert model._prepare_generation_config(GenerationConfig(top_k=9))[0].top_k == 9


def test_a_checkpoint_without_generation_config_gets_one_that_survives(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = BD3LMForMaskedLM.from_pretrained(tmp_path)
    assert loaded.generation_config.pad_token_id == PAD
    loaded.generation_config.nucleus_p = 0.8
    loaded.save_pretrained(tmp_path / "again")
    assert BD3LMForMaskedLM.from_pretrained(tmp_path / "again").generation_config.nucleus_p == 0.8


def test_a_plain_generation_config_works(model):
    plain = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=PAD)
    assert torch.equal(model.generate(PROMPT, generation_config=plain)[:, 6:], written(model))


def test_a_config_of_ours_is_used(model):
    config = BD3LMGenerationConfig(max_new_tokens=9, do_sample=True, nucleus_p=1e-6, repetition_penalty=1.0001)
    assert torch.equal(model.generate(PROMPT, generation_config=config)[:, 6:], written(model))


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "only supports.*GREEDY_SEARCH.*but got generation mode.*BEAM_SEARCH"),
        ({"max_new_tokenz": 3}, "max_new_tokenz"),
        ({"nucleus": 0.9}, "nucleus"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded' does not fit.*use_cache=False"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized' does not fit"),
        ({"cache_implementation": "paged"}, "continuous batching.*call generate with a padded batch"),
        ({"synced_gpus": True}, "synced_gpus=True: generating from sharded weights"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0.*Leave it out"),
        ({"labels": PROMPT}, "generate does not take labels: call the model itself"),
        ({"clean_input_ids": PROMPT, "timesteps": torch.ones(1)}, "does not take clean_input_ids, timesteps"),
        ({"output_attentions": True}, "does not take output_attentions"),
        ({"attention_mask": torch.zeros_like(PROMPT)}, "empty prompt: give every row at least one token"),
        ({"attention_mask": torch.tensor([[0, 1]])}, r"attention_mask of shape \(1, 2\) does not fit input_ids"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_can_not_be_done_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, **{"max_new_tokens": 4, **arguments})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.ones(1, 0, dtype=torch.long), "empty prompt"),
        (torch.full((1, 33), 5), "the prompt has 33 tokens.*model_length=32: shorten it.*truncation=True"),
        (torch.tensor([[5, 48]]), "holds the id 48, outside the vocabulary of 48 ids"),
        (torch.tensor([[5, -1]]), "holds the id -1, outside the vocabulary"),
        (torch.tensor([[5, MASK]]), f"holds mask_token_id={MASK}: generate continues a text"),
    ],
)
def test_a_prompt_that_can_not_be_continued_is_refused(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, max_new_tokens=4)


def test_a_prompt_as_long_as_the_window_is_continued(model):
    assert model.generate(torch.full((1, 32), 5), max_new_tokens=5).shape == (1, 37)


def test_without_a_prompt_bos_is_needed(make_model):
    with pytest.raises(ValueError, match="bos_token_id"):
        make_model(bos_token_id=None).generate(max_new_tokens=4)


def test_a_batch_that_may_stop_apart_needs_a_padding_token(make_model):
    model = make_model(pad_token_id=None)
    with pytest.raises(ValueError, match="no token to pad them with: set pad_token_id"):
        model.generate(PROMPT.expand(2, -1), max_new_tokens=4, max_time=9.0)


def test_a_time_conditioned_model_takes_no_cache(make_model):
    model = make_model(time_conditioning=True)
    with pytest.raises(ValueError, match="past_key_values does not fit this model: with time_conditioning=True"):
        model.generate(PROMPT, max_new_tokens=4, past_key_values=BlockCache())


def test_continuous_batching_is_hidden_and_refused(model):
    assert not hasattr(model, "init_continuous_batching")
    with pytest.raises(ValueError, match="decodes autoregressively"):
        model.generate_batch([[5, 6]])
