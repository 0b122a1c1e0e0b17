"""Every sampler in `generate`: plain twins, batches, costs in passes and in waits, remasking, readers of the text."""

import math
from pathlib import Path

import pytest
import torch
from published_samplers import ancestral_weights, draw_published
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

from bd3lm_hf.modeling import decoding_bd3lm
from bd3lm_hf.modeling.cache_bd3lm import BlockCache
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.decoding_bd3lm import BlockForward
from bd3lm_hf.modeling.decoding_state_bd3lm import SequenceBuffer
from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS


MASK, PAD = 47, 2
PROMPTS = [[9], [11, 12, 13, 14], [3, 4, 5, 6, 7, 8]]
WIDTH = 6
RAGGED = torch.tensor([[PAD] * (WIDTH - len(prompt)) + prompt for prompt in PROMPTS])
# Numbers with which the samplers reveal now one and now several places of the model below.
FIELDS = {
    "first_hitting": {},
    "ancestral": {"num_denoising_steps": 3},
    "confidence": {"confidence_threshold": 0.3},
    "entropy_bound": {"entropy_bound": 2.0},
}
SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS)


@pytest.fixture
def make_model(tiny_config, randomize):
    """A function `(**config fields) -> model` without an end token, of varying certainty."""

    def make(**fields) -> BD3LMForMaskedLM:
        known = {"eos_token_id": None, "mask_token_id": None}
        config = BD3LMConfig(**{**tiny_config.to_diff_dict(), **known, **fields})
        return randomize(BD3LMForMaskedLM(config), std=0.3).eval()

    return make


@pytest.fixture
def model(make_model) -> BD3LMForMaskedLM:
    return make_model()


def write(model, ids=RAGGED, sampler="first_hitting", **arguments):
    arguments = {"max_new_tokens": 11, "do_sample": False, **FIELDS[sampler], **arguments}
    if arguments["do_sample"]:
        arguments.setdefault("generator", torch.Generator().manual_seed(0))
    mask = (ids != PAD).long()
    return model.generate(ids, attention_mask=mask, sampler=sampler, return_dict_in_generate=True, **arguments)


# --- Plain twins -----------------------------------------------------------------------------------------------------


def confident(places, confidence, entropy):
    first = max(places, key=lambda place: confidence[place])
    return {place for place in places if confidence[place] > 0.3} | {first}


def nearly_independent(places, confidence, entropy):
    taken, result = [], set()
    for place in sorted(places, key=lambda place: entropy[place]):
        taken.append(entropy[place])
        if sum(taken) - max(taken) > 2.0:
            break
        result.add(place)
    return result


def in_three_steps(places, confidence, entropy):
    # Of the block's n masked places from the left, the k-th third goes in step k.
    count = in_three_steps.count = len(places) if in_three_steps.left == 0 else in_three_steps.count
    step = 0 if in_three_steps.left == 0 else in_three_steps.step + 1
    plan = [min(2, math.floor((rank + 0.5) / count * 3)) for rank in range(count)]
    while step not in plan:
        step += 1
    now = plan.count(step)
    in_three_steps.step, in_three_steps.left = step, len(places) - now
    return set(sorted(places)[:now])


in_three_steps.left = 0
RULES = {
    "first_hitting": lambda places, confidence, entropy: {min(places)},
    "ancestral": in_three_steps,
    "confidence": confident,
    "entropy_bound": nearly_independent,
}


@torch.no_grad()
def by_hand(model, prompt: list[int], count: int, rule) -> tuple[list[int], int]:
    """Greedy text, one pass over all of it per step, and the number of steps."""
    size, steps = model.config.block_size, 0
    text = list(prompt)
    while len(text) < len(prompt) + count:
        begin = len(text) // size * size
        text += [MASK] * (begin + size - len(text))
        while any(token == MASK for token in text[: len(prompt) + count]):
            logits = model(torch.tensor([text])).logits[0]
            logits[:, [MASK, PAD]] = -torch.inf
            probability = logits.softmax(-1)
            confidence = probability.amax(-1).tolist()
            entropy = torch.special.entr(probability).sum(-1).tolist()
            places = [place for place, token in enumerate(text) if token == MASK]
            for place in rule(places, confidence, entropy):
                text[place] = int(logits[place].argmax())
            steps += 1
    return text[len(prompt) : len(prompt) + count], steps


@SAMPLER
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("block_size", [4, 8])
def test_greedy_text_is_that_of_a_plain_loop(make_model, sampler, use_cache, block_size):
    model = make_model(block_size=block_size)
    passes = 0
    for prompt in PROMPTS:
        # To a block's end, so that the twin's last block is asked for as a whole.
        count = 2 * block_size - len(prompt) % block_size
        output = write(model, torch.tensor([prompt]), sampler, use_cache=use_cache, max_new_tokens=count)
        text, steps = by_hand(model, prompt, count, RULES[sampler])
        assert output.sequences[0, len(prompt) :].tolist() == text
        assert output.num_forward_passes == steps
        assert output.tokens_per_forward == count / steps
        passes += steps
    tokens = sum(2 * block_size - len(prompt) % block_size for prompt in PROMPTS)
    assert passes == tokens if sampler == "first_hitting" else passes < tokens


@SAMPLER
@pytest.mark.parametrize("remask", [0.0, 0.5])
def test_a_greedy_row_does_not_depend_on_its_batch(model, sampler, remask):
    output = write(model, sampler=sampler, remask_fraction=remask)
    for row, prompt in enumerate(PROMPTS):
        alone = write(model, torch.tensor([prompt]), sampler, remask_fraction=remask)
        assert torch.equal(output.sequences[row, WIDTH:], alone.sequences[0, len(prompt) :])


@SAMPLER
def test_greedy_text_repeats_itself_whatever_the_seed(model, sampler):
    texts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        texts.append(write(model, sampler=sampler, remask_fraction=0.5).sequences)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*texts)


@SAMPLER
def test_samples_follow_their_generator_alone(model, sampler):
    state = torch.get_rng_state()
    first, second, other = (
        write(model, sampler=sampler, do_sample=True, generator=torch.Generator().manual_seed(seed)).sequences
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@SAMPLER
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_exactly_as_many_tokens_are_written_as_were_asked_for(model, sampler, count):
    output = write(model, sampler=sampler, do_sample=True, max_new_tokens=count).sequences
    assert output.shape == (3, WIDTH + count) and torch.equal(output[:, :WIDTH], RAGGED)
    assert not torch.isin(output[:, WIDTH:], torch.tensor([MASK, PAD])).any()


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral"])
def test_a_sample_does_not_depend_on_which_other_rows_have_ended(model, sampler):
    plain = write(model, sampler=sampler, do_sample=True, max_new_tokens=20).sequences[:, WIDTH:]
    place, stop = next((p, t) for p, t in enumerate(plain[1].tolist()) if t not in plain[[0, 2]])
    output = write(model, sampler=sampler, do_sample=True, max_new_tokens=20, eos_token_id=stop)
    ended = output.sequences[1, WIDTH:].tolist()
    assert ended[place + 1 :] == [PAD] * (19 - place) and place < 16
    assert torch.equal(output.sequences[[0, 2], WIDTH:], plain[[0, 2]])


@SAMPLER
def test_scores_and_logits_are_those_that_a_token_was_drawn_from(model, sampler):
    arguments = {"output_scores": True, "output_logits": True, "max_new_tokens": 10}
    output = write(model, sampler=sampler, temperature=0.5, do_sample=True, **arguments)
    assert len(output.scores) == len(output.logits) == 10
    for scores, logits in zip(output.scores, output.logits, strict=True):
        assert scores.shape == (3, 48)
        torch.testing.assert_close(scores, logits / 0.5)
    greedy = write(model, sampler=sampler, **arguments)
    chosen = torch.stack([scores.argmax(-1) for scores in greedy.scores], dim=1)
    assert torch.equal(chosen, greedy.sequences[:, WIDTH:])


@SAMPLER
def test_a_time_conditioned_model_is_sampled_by_every_rule(make_model, sampler):
    model = make_model(time_conditioning=True, noise="cosine")
    output = write(model, sampler=sampler, do_sample=True, remask_fraction=0.5)
    assert not torch.isin(output.sequences[:, WIDTH:], torch.tensor([MASK, PAD])).any()


# --- The published trajectories --------------------------------------------------------------------------------------


GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED_MASK = 96


@pytest.fixture(scope="module")
def published() -> tuple[BD3LMForMaskedLM, dict[str, torch.Tensor]]:
    """The network of the published samples, in blocks of 4, and their tensors."""
    config = BD3LMConfig(
        vocab_size=97, model_length=32, block_size=4, hidden_dim=64, cond_dim=16, n_blocks=2, n_heads=4
    )
    model = BD3LMForMaskedLM(config).eval()
    model.load_state_dict(load_file(GOLDEN / "01_bd3lm" / "weights.safetensors"))
    return model, load_file(GOLDEN / "07_samplers" / "tensors.safetensors")


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().index_fill(-1, torch.tensor(PUBLISHED_MASK), -torch.inf).softmax(-1)


@torch.no_grad()
def test_first_hitting_with_the_published_draws_writes_the_published_text(published):
    model, golden = published
    canvas = SequenceBuffer.from_prompts(torch.tensor([[95]]), None, 7, 4, PUBLISHED_MASK)
    passes = BlockForward(model.decoding_network(), canvas, BlockCache(), BD3LMGenerationConfig())
    for step, block in enumerate(golden["fh.block_index"].tolist()):
        ids = canvas.token_ids[:, 4 * block : 4 * block + 4]
        logits = passes.logits(4 * block, torch.arange(4), torch.ones(1))
        drawn = draw_published(probabilities(logits), golden["fh.u_cat"][step].double())
        place = (ids[0] == PUBLISHED_MASK).nonzero().flatten()[golden["fh.pick"][step]]
        ids[0, place] = drawn[place]
        assert torch.equal(ids[0], golden["fh.block_after"][step])
    assert torch.equal(canvas.token_ids, golden["fh.out"])
    # As many passes as steps; the published sampler runs two more, to write its cache.
    assert passes.count == int(golden["fh.nfe"]) == int(golden["fh.forwards"][0] - golden["fh.forwards"][1])


@torch.no_grad()
def test_the_weights_of_an_ancestral_update_are_the_published_ones(published):
    model, golden = published
    masked = golden["ddpm.x"][:, 8:] == PUBLISHED_MASK
    clean = probabilities(model(golden["ddpm.x"]).logits[:, 8:])
    for step, (t, dt) in enumerate([(0.8, 0.1), (0.3, 0.1), (1.0, 0.25)]):
        weights = ancestral_weights(clean, (t - dt) / t, PUBLISHED_MASK)
        expected = golden[f"ddpm.step{step}.q_xs"]
        torch.testing.assert_close(weights[masked].float(), expected[masked], atol=1e-6, rtol=1e-4)
    drawn = draw_published(ancestral_weights(clean, 0.875, PUBLISHED_MASK), golden["ddpm.step0.u"])
    assert torch.equal(torch.where(masked, drawn, golden["ddpm.x"][:, 8:]), golden["ddpm.step0.x_next"][:, 8:])


# --- Costs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(model, monkeypatch) -> list[int]:
    """The number of tokens of every pass of the network."""
    lengths: list[int] = []
    run = model.backbone.run

    def counted(inputs_embeds, *args, **kwargs):
        lengths.append(inputs_embeds.shape[1])
        return run(inputs_embeds, *args, **kwargs)

    monkeypatch.setattr(model.backbone, "run", counted)
    return lengths


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize(
    ("sampler", "fields", "steps"),
    [
        ("first_hitting", {}, 4),
        ("first_hitting", {"num_denoising_steps": 2}, 2),
        ("first_hitting", {"remask_fraction": 0.5}, 6),
        ("first_hitting", {"remask_fraction": 1.0}, 8),
        ("ancestral", {"num_denoising_steps": 1}, 1),
        ("confidence", {"confidence_threshold": 1.0}, 4),
        ("confidence", {"confidence_threshold": 0.0}, 1),
        ("confidence", {"confidence_threshold": 1.0, "num_denoising_steps": 2}, 2),
        ("confidence", {"confidence_threshold": 0.0, "remask_fraction": 0.25}, 2),
        ("entropy_bound", {"entropy_bound": 0.0}, 4),
        ("entropy_bound", {"entropy_bound": 1e9}, 1),
        ("entropy_bound", {"entropy_bound": 0.0, "num_denoising_steps": 3}, 3),
    ],
    ids=str,
)
def test_a_block_takes_as_many_passes_as_denoising_steps(model, passes, sampler, fields, steps, do_sample):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    output = write(model, ids, sampler, **{**fields, "max_new_tokens": 12, "do_sample": do_sample})
    assert output.num_forward_passes == 3 * steps
    assert output.tokens_per_forward == 12 / (3 * steps)
    # The prompt is a block, which the first step writes; later first steps also write the block before them.
    assert passes == [8, *[4] * (steps - 1)] * 3


def test_ancestral_steps_that_reveal_nothing_take_no_pass(model, passes):
    ids = torch.tensor([[5, 6, 7, 8]])
    output = write(model, ids, "ancestral", num_denoising_steps=5000, max_new_tokens=12, do_sample=True)
    assert output.num_forward_passes == len(passes) == 12  # two of four hits in one of 5000 steps hardly happen
    few = write(model, ids, "ancestral", num_denoising_steps=4, max_new_tokens=400, do_sample=True, use_cache=False)
    # Of four steps, each is empty with probability (3/4)^4.
    expected = 100 * 4 * (1 - 0.75**4)
    assert abs(few.num_forward_passes - expected) < 5 * math.sqrt(100 * 4 * 0.32 * 0.68)
    assert few.tokens_per_forward == 400 / few.num_forward_passes


def test_rows_take_their_ancestral_steps_together(model):
    # In 5000 steps no two hits of 8 rows fall together, yet a block takes as many passes as one row has hits.
    ids = torch.tensor([[5, 6, 7, 8]]).expand(8, -1)
    output = write(model, ids, "ancestral", num_denoising_steps=5000, max_new_tokens=12, do_sample=True)
    assert output.num_forward_passes == 12


def test_the_head_runs_at_the_places_of_a_step_only(model, monkeypatch):
    rows = []
    logits = BlockForward.logits

    def watched(self, begin, places, chance):
        rows.append(len(places))
        return logits(self, begin, places, chance)

    monkeypatch.setattr(BlockForward, "logits", watched)
    write(model, RAGGED, "first_hitting", max_new_tokens=4)
    assert rows == [3, 3, 2, 1, 2, 1]  # 3, 4 and 2 places of the first block, then 1, 0 and 2 of the last one
    rows.clear()
    write(model, RAGGED, "confidence", confidence_threshold=1.0, max_new_tokens=4)
    assert rows[:4] == [9, 6, 3, 1]


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a device: its reads of values and of sizes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.WAITING
        return function(*args, **(kwargs or {}))


@SAMPLER
@pytest.mark.parametrize(
    "processed",
    [{}, {"do_sample": True, "temperature": 0.7, "nucleus_p": 0.9, "suppress_tokens": [5]}],
    ids=["greedy", "sampled"],
)
def test_the_host_waits_at_most_once_per_step(make_model, monkeypatch, sampler, processed):
    model, waits, copies, seen = make_model(block_size=16), Waits(), [], []
    logits, cpu = BlockForward.logits, torch.Tensor.cpu

    def watched(self, begin, *args):
        seen.append((begin, waits.count, len(copies)))
        return logits(self, begin, *args)

    def counted(self):
        # On a CPU a copy to the host is no operation.
        copies.append(self.shape)
        return cpu(self)

    monkeypatch.setattr(BlockForward, "logits", watched)
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    ids = torch.tensor([[PAD] * 4 + list(range(5, 17)), list(range(5, 21))])
    with waits:
        write(model, ids, sampler, max_new_tokens=100, eos_token_id=1, num_denoising_steps=8, **processed)
    steps = list(zip(seen, seen[1:], strict=False))
    within = [(after[1] - before[1], after[2] - before[2]) for before, after in steps if before[0] == after[0]]
    between = [(after[1] - before[1], after[2] - before[2]) for before, after in steps if before[0] != after[0]]
    assert len(within) >= 5 and len(between) > 4
    # A parallel sampler reads which predictions were accepted, and then finds what is still masked on the host.
    planned = sampler in ("first_hitting", "ancestral")
    assert set(within) == {(0, 0) if planned else (1, 1)}
    # Behind a block the stop rules are read, and whether a processor forbade everything. The other counts are the
    # host's own: what is masked in the next block is known there.
    forbidding = "suppress_tokens" in processed
    assert set(between) == {(1 + forbidding, 1) if planned else (2 + forbidding, 2)}


# --- Remasking -------------------------------------------------------------------------------------------------------


@SAMPLER
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_remasking_ends_and_touches_no_prompt(model, sampler, fraction):
    output = write(model, sampler=sampler, remask_fraction=fraction, do_sample=True, output_trace=True)
    assert torch.equal(output.sequences[:, :WIDTH], RAGGED)
    assert not torch.isin(output.sequences[:, WIDTH:], torch.tensor([MASK, PAD])).any()
    times = torch.zeros(3, 32, dtype=torch.long)
    for step in output.trace:
        for row, place in step.revealed.nonzero().tolist():
            times[row, int(step.columns[row, place])] += 1
    assert not times[:, :WIDTH].any() and times.max() <= 2
    assert (times.max() == 2) == (fraction > 0.2)  # of four tokens, a tenth is none
    for row in range(3):
        for begin in {step.block for step in output.trace}:
            columns = next(step.columns[row] for step in output.trace if step.block == begin)
            of_block = times[row, columns]
            assert (of_block == 2).sum() == int(fraction * (of_block > 0).sum())


def test_the_least_probable_tokens_are_remasked(model):
    output = write(model, RAGGED[2:], do_sample=True, remask_fraction=0.5, output_trace=True, max_new_tokens=6)
    first = [step for step in output.trace if step.block == 8][:4]
    last = [step for step in output.trace if step.block == 8][4]
    confidence = torch.stack([step.confidence[0] for step in first]).sum(0)
    again = (last.tokens[0] == MASK) | last.revealed[0]
    assert set(again.nonzero().flatten().tolist()) == set(confidence.argsort()[:2].tolist())


def test_remasking_helps_where_a_token_was_chosen_too_early(model):
    # Each remasked token is judged with all others of its block in sight, so the block becomes more probable.
    ids = torch.tensor([[token] for token in range(3, 40)])

    def pseudo_likelihood(text: torch.Tensor) -> float:
        total = 0.0
        for place in range(4, 8):
            masked = text.clone()
            masked[:, place] = MASK
            with torch.no_grad():
                scores = model(masked).logits[:, place].log_softmax(-1)
            total += float(scores.gather(1, text[:, place : place + 1]).sum())
        return total

    arguments = {"sampler": "confidence", "confidence_threshold": 0.0, "max_new_tokens": 7}
    plain, again = (write(model, ids, **arguments, remask_fraction=fraction).sequences for fraction in (0.0, 0.5))
    assert pseudo_likelihood(again) > pseudo_likelihood(plain)


def test_remasking_is_refused_beside_processors_that_read_the_text(model):
    with pytest.raises(ValueError, match="remask_fraction=0.5.*RepetitionPenaltyLogitsProcessor"):
        write(model, remask_fraction=0.5, repetition_penalty=1.2)


def test_a_precision_that_the_device_lacks_is_refused(model, monkeypatch):
    monkeypatch.setattr(decoding_bd3lm, "wide_float", lambda device: torch.float32)
    with pytest.raises(ValueError, match="sampling_dtype='float64'.*cpu"):
        write(model, sampling_dtype="float64")


# --- Readers of the text ---------------------------------------------------------------------------------------------


class Witness(LogitsProcessor):
    """Remembers the contexts it was shown, and leaves the scores alone."""

    def __init__(self) -> None:
        self.contexts: list[torch.Tensor] = []

    def __call__(self, input_ids, scores):
        self.contexts.append(input_ids.clone())
        return scores


@SAMPLER
def test_a_reader_sees_the_text_to_the_left_of_each_place(make_model, sampler):
    model, witness = make_model(block_size=8), Witness()
    ids = RAGGED[2:]
    output = write(model, ids, sampler, do_sample=True, logits_processor=[witness], confidence_threshold=0.05)
    last = {context.shape[1]: context for context in witness.contexts}
    assert list(range(6, 17)) == sorted(last)
    for width, context in last.items():
        # As it was when the token behind it was chosen for good.
        assert torch.equal(context, output.sequences[:, :width])
    assert not any((context == MASK).any() for context in witness.contexts)
    few = sampler != "first_hitting"
    assert (output.num_forward_passes < 11) == few


@SAMPLER
def test_readers_judge_a_greedy_row_as_if_it_stood_alone(model, sampler):
    fields = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 3}
    output = write(model, sampler=sampler, **fields)
    for row, prompt in enumerate(PROMPTS):
        alone = write(model, torch.tensor([prompt]), sampler, **fields)
        assert torch.equal(output.sequences[row, WIDTH:], alone.sequences[0, len(prompt) :])


@torch.no_grad()
def with_penalty(model, prompt: list[int], count: int, threshold: float) -> tuple[list[int], int]:
    """Confidence with a repetition penalty by hand: in a step a run from the left, judged token by token."""
    penalty, steps, text, size = RepetitionPenaltyLogitsProcessor(1.5), 0, list(prompt), model.config.block_size
    while len(text) < len(prompt) + count:
        begin = len(text) // size * size
        noisy = torch.tensor([text + [MASK] * (begin + size - len(text))])
        logits = model(noisy).logits[0]
        logits[:, [MASK, PAD]] = -torch.inf
        steps += 1
        first = len(text)
        for place in range(first, begin + size):
            scores = penalty(torch.tensor([text]), logits[place : place + 1].clone())
            probability, token = scores.softmax(-1).max(-1)
            if place > first and probability <= threshold:
                break
            text.append(int(token))
            if place == first and probability <= threshold:
                break
    return text[len(prompt) : len(prompt) + count], steps


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.9])
def test_a_run_is_judged_token_by_token(make_model, threshold):
    model = make_model(block_size=8)
    fields = {"sampler": "confidence", "confidence_threshold": threshold, "repetition_penalty": 1.5}
    output = write(model, RAGGED, max_new_tokens=10, **fields)
    for row, prompt in enumerate(PROMPTS):
        text, _ = with_penalty(model, prompt, 10, threshold)
        assert output.sequences[row, WIDTH:].tolist() == text
        count = 16 - len(prompt)
        alone = write(model, torch.tensor([prompt]), max_new_tokens=count, **fields)
        assert alone.num_forward_passes == with_penalty(model, prompt, count, threshold)[1]


@SAMPLER
@pytest.mark.parametrize("sampled", [True, False])
def test_readers_keep_their_word_with_every_sampler(make_model, sampler, sampled):
    model = make_model(block_size=8)
    arguments = {"max_new_tokens": 24, "do_sample": sampled, "top_k": 2}
    plain = write(model, RAGGED, sampler, **arguments).sequences.tolist()
    pairs = [pair for row in plain for pair in zip(row[WIDTH:], row[WIDTH + 1 :], strict=False)]
    first, second = max(set(pairs), key=pairs.count)
    unique = write(model, RAGGED, sampler, **arguments, no_repeat_ngram_size=2).sequences.tolist()
    for row in unique:
        pairs = list(zip(row[WIDTH:], row[WIDTH + 1 :], strict=False))
        assert len(set(pairs)) == len(pairs)
    without = write(model, RAGGED, sampler, **arguments, bad_words_ids=[[first, second]]).sequences.tolist()
    assert (first, second) not in {
        pair for row in without for pair in zip(row[WIDTH:], row[WIDTH + 1 :], strict=False)
    }


class OddOnly(LogitsProcessor):
    """Forbids even tokens, for all places at once: it says that it does not read the text."""

    reads_text = False

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def __call__(self, input_ids, scores):
        self.shapes.append(scores.shape)
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 0, -torch.inf)


@SAMPLER
def test_a_processor_that_says_so_serves_all_places_at_once(model, sampler):
    processor = OddOnly()
    output = write(model, sampler=sampler, logits_processor=[processor], do_sample=True)
    assert (output.sequences[:, WIDTH:] % 2 == 1).all()
    assert len(processor.shapes) == output.num_forward_passes
    assert max(shape[0] for shape in processor.shapes) > (3 if sampler != "first_hitting" else 2)
