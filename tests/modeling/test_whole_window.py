"""Text from models that attend to a whole window: masked diffusion and score entropy, within the window and beyond."""

import pytest
import torch
from transformers import LogitsProcessor
from writing import batch_of

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, MDLMConfig, MDLMForMaskedLM, SEDDConfig, SEDDForMaskedLM
from bd3lm_hf.modeling.decoding_bd3lm import BlockForward
from bd3lm_hf.modeling.samplers_bd3lm import SAMPLERS


PAD, MASK, WINDOW = 2, 15, 8
KINDS = {"mdlm": (MDLMForMaskedLM, MDLMConfig), "sedd": (SEDDForMaskedLM, SEDDConfig)}
PROMPT = torch.tensor([[5, 6, 7]])


def make(kind: str, **fields):
    """A model whose greedy text varies."""
    sizes = {"vocab_size": 16, "model_length": WINDOW, "hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    model_class, config_class = KINDS[kind]
    model = model_class(config_class(**{**sizes, **ids, "dropout": 0.0, **fields})).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + ("norm" in name))
        model.backbone.vocab_embed.embedding.mul_(4)[MASK] = 0
        for layer in model.backbone.blocks:
            layer.attn_qkv.weight.mul_(6)
        for shared in (
            model.get_output_embeddings().bias,
            *model.backbone.output_layer.adaLN_modulation.parameters(),
        ):
            shared.zero_()
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def mdlm():
    return make("mdlm")


@pytest.fixture(scope="module")
def sedd():
    return make("sedd")


def write(model, ids: torch.Tensor = PROMPT, new_tokens: int = 17, **arguments):
    arguments = {"do_sample": False, "return_dict_in_generate": True, **arguments}
    return model.generate(ids, max_new_tokens=new_tokens, **arguments)


def seeded(seed: int) -> dict:
    return {"do_sample": True, "generator": torch.Generator().manual_seed(seed)}


def test_the_texts_of_these_models_vary(model):
    assert len(set(write(model).sequences[0].tolist())) > 5


@pytest.mark.parametrize("stride", [None, 1, 3, 7])
def test_beyond_the_window_a_text_goes_on_as_from_its_last_tokens(model, stride):
    # The plain twin: every window on its own, with what it holds of the text as its prompt.
    output, step = write(model, window_stride=stride), stride or WINDOW // 2
    text, passes, end = PROMPT, 0, PROMPT.shape[1] + 17
    while text.shape[1] < end:
        context = text[:, -(WINDOW - step) :] if text.shape[1] >= WINDOW else text
        one = write(model, context, min(WINDOW - context.shape[1], end - text.shape[1]))
        text = torch.cat([text, one.sequences[:, context.shape[1] :]], dim=1)
        passes += one.num_forward_passes
    assert torch.equal(output.sequences, text)
    assert output.num_forward_passes == passes


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stride", [None, 3])
@pytest.mark.parametrize("lengths", [[1, 5, 7], [1, WINDOW, 4]], ids=str)
def test_a_row_of_a_batch_is_written_as_if_it_stood_alone(model, side, stride, lengths):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, MASK, (length,), generator=generator) for length in lengths]
    batch = batch_of(prompts, side)
    output = write(model, batch["input_ids"], attention_mask=batch["attention_mask"], window_stride=stride)
    assert torch.equal(output.sequences[:, : max(lengths)], batch["input_ids"])  # prompts stay
    for row, prompt in enumerate(prompts):
        alone = write(model, prompt[None], window_stride=stride).sequences[0, len(prompt) :]
        assert torch.equal(output.sequences[row, max(lengths) :], alone)


@pytest.mark.parametrize("lengths", [[1, 5, 7], [1, WINDOW, 4]], ids=str)
def test_with_a_generator_of_its_own_a_row_draws_what_it_draws_alone(model, lengths):
    batch = batch_of([torch.arange(3, 3 + length) for length in lengths], "left")
    sources = [torch.Generator().manual_seed(seed) for seed in range(3)]
    both = write(model, batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True, generator=sources)
    for row, length in enumerate(lengths):
        source = [torch.Generator().manual_seed(row)]
        alone = write(model, torch.arange(3, 3 + length)[None], do_sample=True, generator=source)
        assert torch.equal(both.sequences[row, -17:], alone.sequences[0, -17:])


def test_a_seed_repeats_a_text_and_another_gives_another(model):
    first, again, other = (write(model, **seeded(seed)).sequences for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for text in (first, other):
        assert torch.equal(text[:, :3], PROMPT) and not torch.isin(text, torch.tensor([MASK, PAD])).any()


def test_every_pass_of_the_network_is_counted(model, monkeypatch):
    seen, logits = [], BlockForward.logits

    def counted(self, begin, rows, t):
        seen.append(begin)
        return logits(self, begin, rows, t)

    monkeypatch.setattr(BlockForward, "logits", counted)
    output = write(model, **seeded(0))
    assert output.num_forward_passes == len(seen)
    assert output.tokens_per_forward == pytest.approx(17 / len(seen))
    assert sorted(set(seen)) == [0, 4, 8, 12]


def test_masked_diffusion_takes_a_pass_per_token_by_default_and_fewer_when_told(mdlm):
    assert write(mdlm, new_tokens=5).num_forward_passes == 5
    assert write(mdlm, new_tokens=9).num_forward_passes == 5 + 4
    assert write(mdlm, new_tokens=9, num_denoising_steps=2).num_forward_passes == 2 + 2


def test_score_entropy_takes_at_most_a_pass_per_step_and_one_to_end_with(sedd):
    for steps in (1, 2, 30):
        assert 1 <= write(sedd, new_tokens=5, num_denoising_steps=steps, **seeded(0)).num_forward_passes <= steps + 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masked_diffusion_has_all_samplers_beyond_the_window(mdlm, sampler):
    fields = {"sampler": sampler, "confidence_threshold": 0.2, "num_denoising_steps": 3}
    output = write(mdlm, **fields, **seeded(3))
    assert output.sequences.shape == (1, 20) and not (output.sequences == MASK).any()
    assert output.num_forward_passes <= 4 * 3


def test_a_row_ends_with_its_end_token_and_the_others_go_on(model):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    free = write(model, ids).sequences[:, 3:]
    end = int(free[0, 6])
    stopped = write(model, ids, eos_token_id=end).sequences[:, 3:]
    for row, whole in zip(stopped, free, strict=True):
        where = (whole == end).nonzero()
        length = int(where[0]) + 1 if len(where) else 17
        assert torch.equal(row[:length], whole[:length]) and (row[length:] == PAD).all()


class Listener:
    """A streamer that takes drafts."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.drafts: list[tuple[int, int]] = []  # tokens shown before, and in the draft

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def put_draft(self, value: torch.Tensor) -> None:
        self.drafts.append((len(self.tokens), len(value)))

    def end(self) -> None:
        self.tokens.append(-1)


def test_a_streamer_gets_every_token_once_and_drafts_of_what_is_new(model):
    listener = Listener()
    output = write(model, streamer=listener)
    assert listener.tokens == [*output.sequences[0].tolist(), -1]
    assert listener.drafts
    for shown, draft in listener.drafts:
        assert draft <= (5 if shown == 3 else 4)  # the rest of the first window, then a stride


class Witness(LogitsProcessor):
    """Remembers the contexts it was shown, and leaves the scores alone."""

    def __init__(self) -> None:
        self.contexts: list[torch.Tensor] = []

    def __call__(self, input_ids, scores):
        self.contexts.append(input_ids.clone())
        return scores


def test_a_processor_that_reads_the_text_sees_all_of_it(model):
    witness = Witness()
    output = write(model, logits_processor=[witness], **seeded(0))
    assert [context.shape[1] for context in witness.contexts] == list(range(3, 20))
    assert all(torch.equal(context, output.sequences[:, : context.shape[1]]) for context in witness.contexts)


@pytest.mark.parametrize("nucleus_p", [0.99, 0.2])
def test_a_nucleus_gives_way_to_constraints(model, nucleus_p):
    # Only tokens that a nucleus of one may lack are allowed.
    allowed = [11, 12, 13]
    output = write(model, nucleus_p=nucleus_p, prefix_allowed_tokens_fn=lambda row, ids: allowed, **seeded(0))
    assert torch.isin(output.sequences[:, 3:], torch.tensor(allowed)).all()


def test_scores_and_logits_are_those_a_token_was_drawn_from(model):
    output = write(model, output_scores=True, output_logits=True, temperature=0.5, do_sample=True, top_k=1)
    new = output.sequences[0, 3:]
    assert len(output.scores) == len(output.logits) == 17
    for token, scores, logits in zip(new, output.scores, output.logits, strict=True):
        assert int(scores.argmax()) == int(logits.argmax()) == int(token)
        assert scores.isfinite().sum() == 1 and logits[0, MASK] == logits[0, PAD] == -torch.inf


def test_a_trace_replays_the_text(model):
    output = write(model, output_trace=True, remask_fraction=0.3, **seeded(0))
    text = output.sequences.clone()
    text[:, 3:] = MASK
    for step in output.trace:
        inside = step.columns[0] >= 3
        shown = inside & (step.columns[0] < 20)
        text[0, step.columns[0][shown]] = step.tokens[0][shown]
    assert torch.equal(text, output.sequences)


def test_gaps_are_filled_in_rows_of_all_lengths(model):
    texts = [torch.tensor([3, MASK, 5, 6, MASK, 8, 9, 10]), torch.tensor([MASK, 4, MASK])]
    batch = batch_of(texts, "left")
    filled = model.infill(**batch, do_sample=False)
    for row, text in zip(filled, texts, strict=True):
        alone = model.infill(text[None], do_sample=False)[0]
        assert torch.equal(row[-len(text) :], alone) and not (alone == MASK).any()
        assert torch.equal(alone[text != MASK], text[text != MASK])


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_a_stride_beyond_the_window_is_refused(model):
    with pytest.raises(ValueError, match="window_stride=9 would skip tokens: give at most the window, model_length=8"):
        write(model, window_stride=9)


def test_a_stride_is_not_for_block_diffusion():
    model = BD3LMForMaskedLM(BD3LMConfig(vocab_size=16, model_length=8, block_size=4, hidden_dim=16, n_heads=2))
    with pytest.raises(
        ValueError, match="window_stride=3 is for models whose block fills the window.*by blocks of 4. Leave it out"
    ):
        write(model, window_stride=3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_score_has_a_sampler_of_its_own(sedd, sampler):
    message = f"sampler='{sampler}' does not fit what a SEDDForMaskedLM predicts: choose 'analytic', or leave it out"
    with pytest.raises(ValueError, match=message):
        write(sedd, sampler=sampler)


def test_the_analytic_sampler_is_for_scores_only(mdlm):
    with pytest.raises(
        ValueError, match="'analytic' does not fit what a MDLMForMaskedLM predicts: choose 'first_hitting',"
    ):
        write(mdlm, sampler="analytic")


def test_a_prompt_beyond_the_window_is_refused(model):
    with pytest.raises(ValueError, match="the prompt has 9 tokens, more than the model's window model_length=8"):
        write(model, torch.full((1, 9), 5))


def test_the_sampler_of_a_score_lives_in_its_checkpoint(sedd, tmp_path):
    sedd.save_pretrained(tmp_path)
    loaded = SEDDForMaskedLM.from_pretrained(tmp_path)
    assert loaded.generation_config.sampler == "analytic"
    assert torch.equal(write(loaded).sequences, write(sedd).sequences)
