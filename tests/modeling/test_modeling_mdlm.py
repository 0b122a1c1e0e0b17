"""Masked diffusion: parity with the published one, and what it shares with block diffusion."""

import pytest
import torch
from published import load_recorded, published, recorded_noise

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, MDLMConfig, MDLMForMaskedLM
from bd3lm_hf.modeling.cache_bd3lm import BlockCache


SIZES = {"vocab_size": 12, "model_length": 8, "hidden_dim": 16, "cond_dim": 8, "n_blocks": 2, "n_heads": 2}


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_recorded("06_mdlm_sedd")


def test_logits_are_the_published_ones(recorded):
    model = published("06_mdlm_sedd", MDLMForMaskedLM, MDLMConfig)
    torch.testing.assert_close(model(recorded["xt"]).logits, recorded["mdlm.logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "scale", "training"),
    [("mdlm.full", False, False), ("mdlm.scale", True, False), ("mdlm.train", False, True)],
)
def test_losses_are_the_published_ones(recorded, case, scale, training):
    model = published("06_mdlm_sedd", MDLMForMaskedLM, MDLMConfig, mdlm_loss_scale=scale).train(training)
    loss = model(recorded["x0"], labels=recorded["x0"], **recorded_noise(recorded, case)).loss
    torch.testing.assert_close(loss, recorded[f"{case}.loss"], atol=1e-5, rtol=0)


def two_models(randomize):
    mdlm = randomize(MDLMForMaskedLM(MDLMConfig(**SIZES, dropout=0.0))).eval()
    bd3lm = BD3LMForMaskedLM(BD3LMConfig(**SIZES, dropout=0.0, block_size=8)).eval()
    bd3lm.load_state_dict(
        {**mdlm.state_dict(), "sampling_eps_min": torch.tensor(1e-3), "sampling_eps_max": torch.ones(())}
    )
    return mdlm, bd3lm


def test_block_diffusion_with_one_block_is_masked_diffusion(randomize):
    mdlm, bd3lm = two_models(randomize)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (3, 8), generator=generator)
    noise = {
        "block_noise": torch.rand(3, 1, generator=generator),
        "token_noise": torch.rand(3, 8, generator=generator),
    }
    for training in (False, True):
        losses = [model.train(training)(ids, labels=ids, **noise).loss for model in (mdlm, bd3lm)]
        torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    for loss in losses:
        loss.backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (mdlm, bd3lm)]
    assert gradients[0]["backbone.vocab_embed.embedding"].any()
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
    for estimator in ("exact", "stratified", "sampled"):
        scores = [
            model.eval().token_nll(ids, estimator=estimator, generator=torch.Generator().manual_seed(1)).nll
            for model in (mdlm, bd3lm)
        ]
        torch.testing.assert_close(*scores, atol=1e-6, rtol=0)
    x_t = ids.clone()
    x_t[:, 3:6] = 11
    torch.testing.assert_close(mdlm(x_t).logits, bd3lm(x_t, clean_input_ids=ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_scores_as_if_it_stood_alone(randomize, side):
    mdlm, _ = two_models(randomize)
    ids = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(1))
    real = slice(3, 8) if side == "left" else slice(0, 5)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[1, real] = 1

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    both = mdlm.token_nll(ids, mask, estimator="stratified", num_samples=3, generator=generators())
    alone = mdlm.token_nll(ids[1:, real], estimator="stratified", num_samples=3, generator=generators()[1:])
    torch.testing.assert_close(both.nll[1, real], alone.nll[0], atol=1e-5, rtol=0)


def test_the_exact_bound_equals_the_mean_of_draws(randomize):
    mdlm, _ = two_models(randomize)
    ids = torch.randint(0, 11, (1, 5), generator=torch.Generator().manual_seed(2))
    exact = mdlm.token_nll(ids, estimator="exact").nll.sum()

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return mdlm.token_nll(ids, estimator="stratified", num_samples=4, generator=generator).nll.sum()

    draws = torch.stack([draw(seed) for seed in range(200)])
    assert abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5


def test_a_text_beyond_the_window_is_refused():
    model = MDLMForMaskedLM(MDLMConfig(**SIZES))
    ids = torch.zeros(1, 9, dtype=torch.long)
    for call in (lambda: model(ids), lambda: model(ids, labels=ids), lambda: model.token_nll(ids)):
        with pytest.raises(ValueError, match="tokens does not fit the window, model_length=8"):
            call()


# Writing

PROMPTS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@torch.no_grad()
def continued(model, prompt: list[int], count: int, stride: int) -> list[int]:
    """Greedy text by the plainest means: window after window, the leftmost masked token first."""
    mask, window = model.config.mask_token_id, model.config.model_length
    text, first = list(prompt), 0
    while len(text) < len(prompt) + count:
        if len(text) >= first + window:
            first += stride
            continue
        seen = text[first:] + [mask] * (window - len(text) + first)
        logits = model(torch.tensor([seen])).logits[0, len(text) - first]
        logits[mask] = -torch.inf
        text.append(int(logits.argmax()))
    return text


def loud(model):
    with torch.no_grad():
        model.backbone.vocab_embed.embedding.mul_(4)
        for layer in model.backbone.blocks:
            layer.attn_qkv.weight.mul_(6)
            layer.attn_out.weight.mul_(6)
    return model


@pytest.mark.parametrize("stride", [None, 1, 3, 8])
def test_a_text_beyond_the_window_is_written_by_overlapping_windows(randomize, stride):
    # By default the window moves by half of itself, as published (512 of 1024).
    model = loud(two_models(randomize)[0])
    output = model.generate(PROMPTS, max_new_tokens=18, window_stride=stride, return_dict_in_generate=True)
    assert output.sequences.tolist() == [continued(model, row, 18, stride or 4) for row in PROMPTS.tolist()]
    assert output.num_forward_passes == 18


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_any_length_is_continued_as_if_it_stood_alone(randomize, side):
    # One prompt fills the window, so that its first window of new tokens is its second one.
    model = loud(two_models(randomize)[0])
    rows = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 3, 1], [5, 5, 2, 10, 7]]
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(8 - len(row), 8) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    written = model.generate(ids, attention_mask=mask, max_new_tokens=11)[:, 8:]
    for number, row in enumerate(rows):
        assert written[number].tolist() == continued(model, row, 11, 4)[len(row) :]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampler": "ancestral", "num_denoising_steps": 5},
        {"sampler": "confidence", "confidence_threshold": 0.2},
        {"sampler": "entropy_bound", "entropy_bound": 2.0},
        {"num_denoising_steps": 2, "remask_fraction": 0.3},
        {"window_stride": 3, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_block_diffusion_with_one_block_writes_the_same(randomize, fields):
    def write(model) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(4)
        options = {"do_sample": True, "generator": generator, "return_dict_in_generate": True, **fields}
        output = model.generate(PROMPTS, max_new_tokens=13, **options)
        return output.sequences, output.num_forward_passes

    (of_mdlm, passes), (of_bd3lm, others) = (write(loud(model)) for model in two_models(randomize))
    assert of_mdlm.equal(of_bd3lm) and passes == others
    assert of_mdlm[:, :3].equal(PROMPTS) and not (of_mdlm == 11).any()


def test_few_steps_cost_few_passes_in_every_window(randomize):
    model, _ = two_models(randomize)
    output = model.generate(PROMPTS, max_new_tokens=13, num_denoising_steps=2, return_dict_in_generate=True)
    assert output.num_forward_passes <= 2 * 3  # 8, 12 and 16 tokens


def test_what_a_window_adds_is_streamed_once(randomize):
    class Listener:
        def __init__(self) -> None:
            self.shown, self.drafts = [], []

        def put(self, value: torch.Tensor) -> None:
            self.shown += value.flatten().tolist()

        def put_draft(self, value: torch.Tensor) -> None:
            self.drafts.append(len(value))

        def end(self) -> None:
            self.shown.append("end")

    model, listener = loud(two_models(randomize)[0]), Listener()
    written = model.generate(PROMPTS[:1], max_new_tokens=13, streamer=listener)
    assert listener.shown == [*written[0].tolist(), "end"]
    assert listener.drafts == [1, 2, 3, 4, 5, 1, 2, 3, 4, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_stride": 9}, "window_stride=9 would skip tokens: give at most the window, model_length=8"),
        ({"window_stride": 0}, "window_stride=0"),
        (
            {"sampler": "analytic"},
            "sampler='analytic' does not fit what a MDLMForMaskedLM predicts: choose 'first_hit",
        ),
    ],
)
def test_what_does_not_fit_a_window_is_refused(randomize, fields, message):
    model, _ = two_models(randomize)
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, max_new_tokens=2, **fields)


def test_a_cache_that_holds_a_text_is_refused(randomize):
    model, cache = two_models(randomize)[0], BlockCache()
    model(torch.arange(8).unsqueeze(0), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values does not fit this model: its block of 8 tokens fills"):
        model.generate(torch.arange(8).unsqueeze(0), max_new_tokens=2, past_key_values=cache)


def test_a_stride_is_nothing_to_a_model_of_smaller_blocks(tiny_model):
    with pytest.raises(ValueError, match="window_stride=4 is for models whose block fills the window of 32 tokens"):
        tiny_model.generate(PROMPTS, max_new_tokens=2, window_stride=4)
