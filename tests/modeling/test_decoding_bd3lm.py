"""Denoising a block: the published trajectories, costs in forward passes and synchronisations, remasking, traces."""

import pytest
import torch
from generating import FIELDS, MASK, PAD, assert_same, batch_of, generate, make_family, new_tokens, prompts_of
from published import draw_published, published_bd3lm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from bd3lm_hf.modeling.cache_bd3lm import BlockCache
from bd3lm_hf.modeling.decoding_bd3lm import BlockForward, Trace
from bd3lm_hf.modeling.decoding_state_bd3lm import SequenceBuffer
from bd3lm_hf.modeling.generation_config_bd3lm import BD3LMGenerationConfig
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS


RECORDED = "07_samplers"
PUBLISHED_MASK = 96
SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS)
ONE_BLOCK = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def model():
    return make_family("bd3lm", model_length=32)


@pytest.fixture
def forwards(model, monkeypatch) -> list[tuple[int, int]]:
    """Record the rows and tokens of every forward pass of the network."""
    shapes: list[tuple[int, int]] = []
    run = model.backbone.run

    def counted(inputs_embeds, *args, **kwargs):
        shapes.append(tuple(inputs_embeds.shape[:2]))
        return run(inputs_embeds, *args, **kwargs)

    monkeypatch.setattr(model.backbone, "run", counted)
    return shapes


def sampled(seed: int = 0) -> dict:
    return {"do_sample": True, "generator": torch.Generator().manual_seed(seed)}


# --- The published trajectories --------------------------------------------------------------------------------------


@torch.no_grad()
def test_first_hitting_with_the_published_noise_gives_the_published_text(recorded):
    buffer = SequenceBuffer.from_prompts(torch.tensor([[95]]), None, 7, 4, PUBLISHED_MASK)
    forward = BlockForward(published_bd3lm(4).decoding_network(), buffer, BlockCache(), BD3LMGenerationConfig())
    for step, block in enumerate(recorded["fh.block_index"].tolist()):
        ids = buffer.token_ids[:, 4 * block : 4 * block + 4]
        logits = forward.logits(4 * block, torch.arange(4), torch.ones(1)).double()
        logits[:, PUBLISHED_MASK] = -torch.inf
        drawn = draw_published(logits.softmax(-1), recorded["fh.u_cat"][step].double())
        position = (ids[0] == PUBLISHED_MASK).nonzero().flatten()[recorded["fh.pick"][step]]
        ids[0, position] = drawn[position]
        assert torch.equal(ids[0], recorded["fh.block_after"][step])
    assert torch.equal(buffer.token_ids, recorded["fh.out"])
    # As many forward passes as steps; the published sampler runs two more, to write its cache.
    assert forward.count == int(recorded["fh.nfe"]) == int(recorded["fh.forwards"][0] - recorded["fh.forwards"][1])


# --- Costs -----------------------------------------------------------------------------------------------------------


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
def test_a_block_takes_one_forward_pass_per_denoising_step(model, forwards, sampler, fields, steps, do_sample):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    options = {"sampler": sampler, **fields, "max_new_tokens": 12, "do_sample": do_sample}
    output = generate(model, ids, **options)
    assert output.num_forward_passes == 3 * steps and output.row_forward_passes.tolist() == [3 * steps] * 2
    assert output.tokens_per_forward == 12 / (3 * steps)
    # The prompt is a block, which the first step writes; later first steps also write the block before them.
    assert [tokens for _, tokens in forwards] == [8, *[4] * (steps - 1)] * 3


def test_the_prompt_takes_one_forward_pass_and_a_moved_exact_window_one_per_block(model, forwards):
    output = generate(model, prompts_of([28])[0], max_new_tokens=12)
    assert output.num_forward_passes == 12
    assert [tokens for _, tokens in forwards] == [28, 4, 4, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]
    forwards.clear()
    generate(model, prompts_of([28])[0], max_new_tokens=12, window="exact")
    assert [tokens for _, tokens in forwards] == [28, 4, 4, 4, 4] * 3


def test_the_head_runs_at_the_positions_of_a_step_only(model, monkeypatch):
    counts, head = [], model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: counts.append(len(inputs[0])))
    batch = batch_of(prompts_of([1, 4, 6]))
    generate(model, **batch, max_new_tokens=4)
    assert counts == [3, 3, 2, 1, 2, 1]  # 3, 4 and 2 positions of the first block, then 1, 0 and 2 of the last one
    counts.clear()
    generate(model, **batch, sampler="confidence", confidence_threshold=1.0, max_new_tokens=4)
    assert counts[:4] == [9, 6, 3, 1]
    handle.remove()


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"window": "exact"}, {"cache_implementation": "static"}]
)
def test_finished_rows_are_dropped_when_they_are_half(model, forwards, options):
    prompts = prompts_of([6, 13, 5, 9, 1, 16, 7, 8])
    batch = batch_of(prompts)
    plain = new_tokens(generate(model, **batch, max_new_tokens=30))
    stops, ended = [], set()
    for token in plain.unique().tolist():  # all rows but one end before the last block
        rows = set((plain[:, :24] == token).any(1).nonzero().flatten().tolist())
        if len(ended | rows) < 8:
            stops, ended = [*stops, token], ended | rows
    assert len(ended) >= 4
    forwards.clear()
    output = generate(model, **batch, max_new_tokens=30, eos_token_id=stops, **options)
    rows = [rows for rows, _ in forwards]
    for row, prompt in enumerate(prompts[:3]):  # before it is dropped, a finished row takes part in no step either
        alone = generate(model, prompt, max_new_tokens=30, eos_token_id=stops, **options)
        assert output.row_forward_passes[row] == alone.row_forward_passes[0]
    static = "cache_implementation" in options  # another batch size would be compiled again
    assert rows == sorted(rows, reverse=True) and (rows[-1] <= 4) != static
    assert all(b == a or 2 * b <= a for a, b in zip(rows, rows[1:], strict=False))
    if not options:  # the cache lacks rows, so it comes back empty and can be used again
        assert output.past_key_values.get_seq_length() == 0
        ids = prompts_of([6])[0]
        assert_same(generate(model, ids, past_key_values=output.past_key_values), generate(model, ids))


class Synchronisations(TorchDispatchMode):
    """Count the waits of the CPU for a device: reads of values that come from the network, directly or not.

    On a CPU a tensor does not show on which device it would be, so everything computed from the network's logits
    counts as on the device until `.cpu()`, which is one wait.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.device_tensors = 0, {}

    def mark(self, tensor: torch.Tensor) -> None:
        self.device_tensors[id(tensor)] = tensor  # kept alive, so that no id is used twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = any(id(x) in self.device_tensors for x in inputs)
        self.count += on_device and function.overloadpacket.__name__ in self.WAITING
        output = function(*args, **(kwargs or {}))
        if on_device:
            for tensor in torch.utils._pytree.tree_leaves(output):
                if isinstance(tensor, torch.Tensor):
                    self.mark(tensor)
        return output


@SAMPLER
@pytest.mark.parametrize(
    "options",
    [{}, {**sampled(), "temperature": 0.7, "nucleus_p": 0.9, "suppress_tokens": [5]}],
    ids=["greedy", "sampled"],
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_denoising_step_waits_for_the_device_at_most_once(monkeypatch, sampler, options, cache):
    model, watch, seen = make_family("bd3lm", block_size=16, model_length=32), Synchronisations(), []
    logits, cpu = BlockForward.logits, torch.Tensor.cpu

    def on_device(self, begin, *args):
        seen.append((begin, watch.count))
        output = logits(self, begin, *args)
        watch.mark(output)
        return output

    def waiting(self):
        watch.count += id(self) in watch.device_tensors
        return cpu(self).clone() if id(self) not in watch.device_tensors else torch.tensor(self.tolist())

    monkeypatch.setattr(BlockForward, "logits", on_device)
    monkeypatch.setattr(torch.Tensor, "cpu", waiting)
    ids = batch_of(prompts_of([12, 16]))
    with watch:
        options = {**options, "sampler": sampler, "cache_implementation": cache, "num_denoising_steps": 8}
        generate(model, **ids, max_new_tokens=20, eos_token_id=1, output_logits=False, **options)
    waits = [(later[1] - earlier[1], later[0] == earlier[0]) for earlier, later in zip(seen, seen[1:], strict=False)]
    assert sum(within for _, within in waits) >= 5
    # A step of a parallel sampler reads which predictions were accepted.
    parallel = sampler in ("confidence", "entropy_bound")
    assert {count for count, within in waits if within} == ({1} if parallel else {0})


# --- Remasking -------------------------------------------------------------------------------------------------------


@SAMPLER
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_remasking_terminates_and_leaves_prompts_alone(model, sampler, fraction):
    batch, options = batch_of(prompts_of([1, 4, 6])), {"sampler": sampler, **FIELDS[sampler], **sampled()}
    output = generate(model, **batch, **options, remask_fraction=fraction, output_trace=True)
    assert torch.equal(output.sequences[:, :6], batch["input_ids"])
    assert not torch.isin(new_tokens(output), torch.tensor([MASK, PAD])).any()
    times = torch.zeros(3, 32, dtype=torch.long)
    for step in output.trace:
        for row, position in step.revealed.nonzero().tolist():
            times[row, int(step.columns[row, position])] += 1
    assert not times[:, :6].any() and times.max() <= 2
    for step in output.trace:
        for row in range(3):
            of_block = times[row, step.columns[row]]
            assert (of_block == 2).sum() == int(fraction * (of_block > 0).sum())
    greedy = {"sampler": sampler, **FIELDS[sampler], "remask_fraction": fraction}
    together = new_tokens(generate(model, **batch, **greedy))
    for row, prompt in enumerate(prompts_of([1, 4, 6])):
        assert torch.equal(new_tokens(generate(model, prompt, **greedy))[0], together[row])


def test_the_least_probable_tokens_are_remasked(model):
    output = generate(model, ONE_BLOCK, **sampled(), remask_fraction=0.5, output_trace=True, max_new_tokens=4)
    confidence = torch.stack([step.confidence[0] for step in output.trace[:4]]).sum(0)
    again = (output.trace[4].tokens[0] == MASK) | output.trace[4].revealed[0]
    assert set(again.nonzero().flatten().tolist()) == set(confidence.argsort()[:2].tolist())


def test_remasking_excludes_processors_that_read_the_text(model):
    with pytest.raises(ValueError, match="remask_fraction=0.5.*RepetitionPenaltyLogitsProcessor"):
        generate(model, ONE_BLOCK, remask_fraction=0.5, repetition_penalty=1.2)
    generate(model, ONE_BLOCK, remask_fraction=0.5, logits_processor=[TemperatureLogitsWarper(0.7)])


# --- Processors ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def with_penalty(model, prompt: list[int], count: int, threshold: float) -> tuple[list[int], int]:
    """Sample by confidence with a repetition penalty, by hand: each step accepts token by token from the left."""
    penalty, steps, text, size = RepetitionPenaltyLogitsProcessor(1.5), 0, list(prompt), model.config.block_size
    while len(text) < len(prompt) + count:
        stop = len(text) // size * size + size
        logits = model(torch.tensor([text + [MASK] * (stop - len(text))])).logits[0].float()
        logits[:, [MASK, PAD]] = -torch.inf
        steps, first = steps + 1, len(text)
        for position in range(first, stop):
            scores = penalty(torch.tensor([text]), logits[position : position + 1].clone())
            probability, token = scores.softmax(-1).max(-1)
            if position > first and probability <= threshold:
                break
            text.append(int(token))
            if position == first and probability <= threshold:
                break
    return text[len(prompt) : len(prompt) + count], steps


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.9])
def test_parallel_samplers_accept_from_the_left_if_processors_read_the_text(threshold):
    model = make_family("bd3lm", block_size=8, model_length=32)
    fields = {"sampler": "confidence", "confidence_threshold": threshold, "repetition_penalty": 1.5}
    for prompt in prompts_of([1, 4, 6]):
        output = generate(model, prompt, max_new_tokens=16 - len(prompt), **fields)
        expected = with_penalty(model, prompt.tolist(), 16 - len(prompt), threshold)
        assert (new_tokens(output)[0].tolist(), output.num_forward_passes) == expected


class OddOnly(LogitsProcessor):
    """Forbid even tokens, for all positions at once."""

    reads_text = False

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def __call__(self, input_ids, scores):
        self.shapes.append(scores.shape)
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 0, -torch.inf)


@SAMPLER
def test_a_processor_that_does_not_read_the_text_serves_all_positions_at_once(model, sampler):
    processor, options = OddOnly(), {"sampler": sampler, **FIELDS[sampler], **sampled()}
    output = generate(model, **batch_of(prompts_of([1, 4, 6])), logits_processor=[processor], **options)
    assert (new_tokens(output) % 2 == 1).all()
    assert len(processor.shapes) == output.num_forward_passes
    assert max(shape[0] for shape in processor.shapes) > (3 if sampler != "first_hitting" else 2)


def test_constraints_that_leave_no_token_are_an_error(model):
    with pytest.raises(ValueError, match="forbid every token"):
        generate(model, ONE_BLOCK, suppress_tokens=list(range(48)))
    ends = generate(model, ONE_BLOCK, suppress_tokens=[t for t in range(48) if t != 9])
    assert new_tokens(ends).unique().tolist() == [9]


# --- Traces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bd3lm", "mdlm", "sedd"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_trace_replays_the_text(family, side):
    model, batch = make_family(family), batch_of(prompts_of([1, 4, 6]), side)
    plain = new_tokens(generate(model, **batch, **sampled()))
    stop = int(plain[0, 3])
    output = generate(model, **batch, **sampled(), eos_token_id=stop, remask_fraction=0.3, output_trace=True)
    text, width = output.sequences.clone(), output.sequences.shape[1]
    text[:, 6:] = MASK
    blocks = [step.block for step in output.trace]
    assert blocks == sorted(blocks)
    for step in output.trace:
        assert ((step.confidence > 0) <= step.revealed).all() and (step.confidence <= 1).all()
        for row in range(3):
            new = (step.columns[row] >= 6) & (step.columns[row] < width)
            text[row, step.columns[row][new]] = step.tokens[row][new]
    ended = output.sequences == PAD  # after the end of a row, the output is padded
    assert torch.equal(text[~ended], output.sequences[~ended])
    assert generate(model, **batch).trace is None


@pytest.mark.parametrize(
    ("real", "blanks", "expected"),
    [
        ([[0, 0, 1], [1, 1, 1]], None, [[-1, -1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]),
        ([[1, 0, 0], [1, 1, 0]], None, [[-1, -1, 0, 3, 4, 5, 6], [0, 1, 3, 4, 5, 6, 7]]),
        ([[0, 0, 1], [1, 1, 1]], True, [[-1, -1, 2, -1, -1, -1, -1], [0, 1, 2, -1, -1, -1, -1]]),
    ],
)
def test_columns_of_the_buffer_are_found_in_the_output(real, blanks, expected):
    real, token_ids = torch.tensor(real), torch.zeros(2, 7, dtype=torch.long)
    blanks = None if blanks is None else token_ids.bool()
    buffer = SequenceBuffer(token_ids, torch.tensor([2, 0]), real.sum(1), 0, 7, 1, None, blanks)
    assert Trace(buffer, real).columns.tolist() == expected


def test_masked_diffusion_takes_a_step_per_token_and_score_entropy_at_most_one_more_than_requested():
    mdlm, sedd, prompt = make_family("mdlm"), make_family("sedd"), torch.tensor([5, 6, 7])
    for tokens, fields, count in ((5, {}, 5), (9, {}, 5 + 4), (9, {"num_denoising_steps": 2}, 2 + 2)):
        assert generate(mdlm, prompt, max_new_tokens=tokens, **fields).num_forward_passes == count
    for steps in (1, 2, 30):
        output = generate(sedd, prompt, max_new_tokens=5, num_denoising_steps=steps, **sampled())
        assert 1 <= output.num_forward_passes <= steps + 1
