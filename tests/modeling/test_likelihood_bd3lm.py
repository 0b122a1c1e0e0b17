"""The likelihood bounds of token_nll, on a toy whose bound is computed by brute force, and their agreement."""

import inspect
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from noisy_text import given_noise, nll_of, random_ids, toy_model
from published import GOLDEN, published_bd3lm, recorded_noise
from shared_models import CLASSES, TINY, tiny_bd3lm

from bd3lm_hf.modeling import likelihood_bd3lm
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.likelihood_bd3lm import LanguageModel, LikelihoodMixin
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.modeling_ssdlm import SSDLMForMaskedLM
from bd3lm_hf.modeling.noise_bd3lm import Noise, draw_noise


RECORDED = "02_bd3lm_loss"


# --- token_nll on a toy whose bound is computed by brute force -------------------------------------------------------


@pytest.fixture(params=[(2, 4), (3, 6), (3, 5), (2, 5)], ids=lambda p: f"block{p[0]}-length{p[1]}")
def toy(request) -> tuple[BD3LMForMaskedLM, torch.Tensor]:
    """A toy model in blocks of 2 or 3, the last one possibly shorter, and a text."""
    block_size, length = request.param
    return toy_model(block_size), torch.tensor([[2, 0, 1, 2, 1, 0]])[:, :length]


def blocks_of(model: BD3LMForMaskedLM, ids: torch.Tensor, maskable: torch.Tensor) -> list[list[int]]:
    size, length = model.config.block_size, ids.shape[1]
    blocks = [range(start, min(start + size, length)) for start in range(0, length, size)]
    return [[position for position in block if maskable[0, position]] for block in blocks]


def subset_nll(model: BD3LMForMaskedLM, ids: torch.Tensor, subset: tuple[int, ...]) -> torch.Tensor:
    """Return -log p of the tokens at `subset`, masked together, given the rest of the block and all earlier blocks."""
    x_t = ids.clone()
    x_t[0, list(subset)] = 3
    with torch.no_grad():
        return nll_of(model, x_t, ids)[0]


def integrated_bound(model, ids, maskable, low: float = 0.0) -> torch.Tensor:
    """Integrate Eq. 8: the mean over t of 1/t * sum over masks of their probability times the masked tokens' NLL.

    The integrand is a polynomial in t of degree below the block size, so 16 Gauss-Legendre nodes are exact.
    """
    nodes, weights = np.polynomial.legendre.leggauss(16)
    times = low + (1 - low) * (nodes + 1) / 2
    bound = torch.zeros(ids.shape[1], dtype=torch.float64)
    for block in blocks_of(model, ids, maskable):
        for size in range(1, len(block) + 1):
            integrand = times**size * (1 - times) ** (len(block) - size) / times
            mean = float((integrand * weights / 2).sum())
            for subset in itertools.combinations(block, size):
                bound += mean * subset_nll(model, ids, subset)
    return bound


def all_but_first(ids: torch.Tensor) -> torch.Tensor:
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, 0] = False
    return maskable


@pytest.mark.parametrize("context", [[0], [], [0, 3]], ids=["first token", "none", "inside a block"])
def test_the_exact_estimator_equals_the_integral_of_the_bound(toy, context):
    model, ids = toy
    model.config.ignore_bos = context == [0]
    labels = ids.index_fill(1, torch.tensor(context, dtype=torch.long), -100)
    score = model.token_nll(ids, labels=None if context == [0] else labels, estimator="exact")
    expected = integrated_bound(model, ids, labels != -100)
    torch.testing.assert_close(score.nll[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(score.mask, (labels != -100).float())
    assert score.nll.dtype == score.mask.dtype == torch.float32


@pytest.mark.parametrize("estimator, num_samples", [("sampled", 1), ("stratified", 1), ("stratified", 3)])
def test_the_random_estimators_are_unbiased(toy, estimator, num_samples):
    model, ids = toy
    rows = 4000
    low = 1e-3 if estimator == "sampled" else 0.0
    # As published, t is uniform on [1e-3, 1] and the weight stays 1/t.
    expected = integrated_bound(model, ids, all_but_first(ids), low=low)
    score = model.token_nll(
        ids.repeat(rows, 1), estimator=estimator, num_samples=num_samples, generator=torch.Generator().manual_seed(0)
    )
    nll = score.nll.double()
    error = nll.std(0) / math.sqrt(rows)
    assert ((nll.mean(0) - expected).abs() <= 4 * error + 1e-6).all()
    total_error = nll.sum(1).std() / math.sqrt(rows)
    assert (nll.sum(1).mean() - expected.sum()).abs() <= 4 * total_error
    assert total_error / expected.sum() < 0.05


def test_the_stratified_estimator_has_a_lower_variance_and_more_samples_lower_the_spread(toy):
    model, ids = toy[0], toy[1].repeat(2000, 1)

    def scores(estimator: str, num_samples: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        score = model.token_nll(ids, estimator=estimator, num_samples=num_samples, generator=generator)
        return score.nll.sum(1)

    def spread(values: torch.Tensor) -> torch.Tensor:
        # Weights of up to 1000 make a variance of the sampled scores hard to estimate.
        return (values - values.median()).abs().mean()

    assert scores("stratified", 1).var() < scores("sampled", 1).var() / 2
    assert spread(scores("sampled", 4)) < 0.65 * spread(scores("sampled", 1))
    # The samples of one block are spread over 1..n, which beats independent ones.
    assert scores("stratified", 3).var() < 0.9 * scores("stratified", 1).var() / 3


def test_several_samples_are_the_mean_of_single_ones_whose_draws_may_be_given(tiny_model):
    ids = random_ids(2, 16)
    together = tiny_model.token_nll(ids, num_samples=3, generator=torch.Generator().manual_seed(0)).nll
    generator = torch.Generator().manual_seed(0)
    single = [tiny_model.token_nll(ids, generator=generator).nll for _ in range(3)]
    torch.testing.assert_close(together, sum(single) / 3, rtol=1e-5, atol=1e-5)
    assert not torch.equal(single[0], single[1])
    given = draw_noise(2, 4, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tiny_model.token_nll(ids, noise=given).nll, single[0])


def test_scores_do_not_depend_on_how_many_samples_share_a_pass(tiny_model, monkeypatch):
    ids, found = random_ids(2, 14), []
    for budget in (1, 100, 2**14):
        monkeypatch.setattr(likelihood_bd3lm, "_TOKEN_BUDGET", budget)
        draws = {"num_samples": 5, "generator": torch.Generator().manual_seed(0)}
        found.append(tiny_model.token_nll(ids, estimator="exact").nll)
        found.append(tiny_model.token_nll(ids, estimator="stratified", **draws).nll)
    torch.testing.assert_close(found[2:4], found[:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[4:], found[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"time_conditioning": True}, {"time_conditioning": True, "block_size": 1}])
def test_the_sampled_score_of_one_sample_is_the_evaluation_loss(make_model, fields):
    model, ids = make_model(**fields), random_ids(4, 16)
    torch.manual_seed(0)
    score = model.token_nll(ids)
    torch.manual_seed(0)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(score.nll.sum() / score.mask.sum(), loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("estimator", ["sampled", "stratified"])
def test_a_generator_for_each_row_makes_its_score_independent_of_the_batch(tiny_model, estimator):
    ids = random_ids(4, 16)

    def generators(rows) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(100 + row) for row in rows]

    arguments = {"estimator": estimator, "num_samples": 2}
    together = tiny_model.token_nll(ids, generator=generators(range(4)), **arguments).nll
    for row in range(4):
        alone = tiny_model.token_nll(ids[row : row + 1], generator=generators([row]), **arguments).nll
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    swapped = tiny_model.token_nll(ids.flip(0), generator=generators([3, 2, 1, 0]), **arguments).nll
    torch.testing.assert_close(swapped.flip(0), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("estimator", ["sampled", "stratified", "exact"])
def test_at_block_size_one_every_estimator_is_the_autoregressive_likelihood(estimator):
    model = tiny_bd3lm(block_size=1)
    ids = random_ids(2, 9)
    expected = torch.zeros(2, 9)
    with torch.no_grad():
        for position in range(1, 9):
            prefix = torch.cat([ids[:, :position], torch.full((2, 1), 47)], dim=1)
            logits = model(prefix).logits[:, -1, :47]
            expected[:, position] = F.cross_entropy(logits, ids[:, position], reduction="none")
        loss = model(input_ids=ids, labels=ids).loss
    score = model.token_nll(ids, estimator=estimator)
    torch.testing.assert_close(score.nll, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.sum() / 16, rtol=1e-5, atol=0)
    model.train().set_interval(1.0, 1.0)  # the loss of training, which masks everything and counts every token
    torch.testing.assert_close(model(ids, labels=ids).loss, expected.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_padded_rows_have_the_scores_and_the_loss_of_the_rows_alone(tiny_model, side, implementation, interpreted):
    tiny_model.set_attn_implementation(implementation)
    texts = [random_ids(1, length, seed=length) for length in (5, 11, 16)]
    mask = torch.zeros(3, 16, dtype=torch.long)
    ids = torch.full((3, 16), 2)
    for row, text in enumerate(texts):
        real = slice(16 - text.shape[1], 16) if side == "left" else slice(0, text.shape[1])
        ids[row, real], mask[row, real] = text[0], 1
    score = tiny_model.token_nll(ids, mask, estimator="exact")
    labels = ids.masked_fill(mask == 0, -100)
    noise = given_noise(3, 4, 16)
    total = torch.zeros(())
    for row, text in enumerate(texts):
        alone = tiny_model.token_nll(text, estimator="exact")
        real = mask[row].bool()
        torch.testing.assert_close(score.nll[row][real], alone.nll[0], rtol=0, atol=1e-5)
        assert torch.equal(score.mask[row][real], alone.mask[0])
        assert not score.nll[row][~real].any() and not score.mask[row][~real].any()
        blocks = slice(-(-text.shape[1] // 4))
        own = {
            "block_noise": noise["block_noise"][row, None, blocks],
            "token_noise": noise["token_noise"][row, None, real],
            "count_noise": noise["count_noise"][row, None, blocks],
        }
        with torch.no_grad():
            total += tiny_model(input_ids=text, labels=text, num_items_in_batch=1, **own).loss
    with torch.no_grad():
        loss = tiny_model(input_ids=ids, labels=labels, attention_mask=mask, num_items_in_batch=1, **noise).loss
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("length", [1, 2, 7, 45])
def test_any_length_can_be_scored(tiny_model, length):
    for estimator in ("sampled", "stratified", "exact"):
        score = tiny_model.token_nll(random_ids(2, length), estimator=estimator)
        assert score.nll.shape == score.mask.shape == (2, length)
        assert score.mask.sum() == 2 * (length - 1)
        assert score.nll.isfinite().all() and (score.nll >= 0).all() and not score.nll.requires_grad


# --- Given noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bs4.full", "bs8.full", "bs16.full", "bs4.pad", "bs4.keep_bos"])
def test_the_score_of_the_published_draws_equals_the_published_one_token_by_token(recorded, name):
    case = json.loads((GOLDEN / RECORDED / "config.json").read_text())["cases"][name]
    model = published_bd3lm(case["block_size"], ignore_bos=case["ignore_bos"])
    given = recorded_noise(recorded, name)
    times = (recorded[f"{name}.t"][:, :: case["block_size"]] - 1e-3) / (1 - 1e-3)
    noise = Noise(times, given["token_noise"], torch.zeros_like(times))
    # The published code never scores padding but does attend to it, and so does this call.
    found = model.token_nll(recorded["x0"], noise=noise)
    token_mask = recorded[f"{name}.token_mask"]
    torch.testing.assert_close(found.nll * token_mask, recorded[f"{name}.nlls"], rtol=2e-5, atol=2e-5)
    assert (found.mask * recorded.get("mask_pad" if name == "bs4.pad" else "mask_ones")).equal(token_mask)


# --- Bad input -------------------------------------------------------------------------------------------------------


NOISE = {"noise": draw_noise(2, 4, 16)}


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({}, {"estimator": "best"}, "estimator='best'.* sampled, stratified, exact"),
        *[({}, {"num_samples": number}, f"num_samples={number}: give at least 1") for number in (0, -2)],
        *[({}, {"generator": [torch.Generator()] * n}, f"{n} generators for 2 rows") for n in (0, 1, 3)],
        ({}, {**NOISE, "estimator": "exact"}, "estimator='exact'"),
        ({}, {**NOISE, "num_samples": 2}, "num_samples=2"),
        ({}, {"noise": draw_noise(2, 4, 16, num_noise_samples=2)}, "num_noise_samples=2"),
        ({}, {"noise": draw_noise(2, 3, 12)}, r"block_noise of shape \(2, 3\) .*\(2, 4\)"),
        ({"block_size": 16}, {"estimator": "exact"}, r"'exact' at block_size=16 .*2\^15.* 8 .*stratified"),
        *[
            ({"time_conditioning": True}, {"estimator": name}, f"estimator='{name}' sums over .* all noise levels")
            for name in ("stratified", "exact")
        ],
    ],
)
def test_scores_that_cannot_be_computed_are_refused(fields, arguments, message):
    model = BD3LMForMaskedLM(BD3LMConfig(**{**TINY, **fields}))
    with pytest.raises(ValueError, match=message):
        model.token_nll(random_ids(2, 16), **arguments)


def test_texts_of_any_length_share_the_noise_of_their_common_blocks(tiny_model):
    ids = random_ids(1, 31)
    scores = []
    for length in (12, 31):
        source = [torch.Generator().manual_seed(3)]
        text = ids[:, :length]
        scores.append(tiny_model.token_nll(text, estimator="stratified", num_samples=3, generator=source).nll[0, :12])
    torch.testing.assert_close(*scores)
    assert (scores[0] > 0).sum() > 6


def test_a_few_tokens_after_a_context_are_scored_exactly_at_any_block_size():
    model = toy_model(12)
    ids = torch.tensor([[2, 0, 1, 2, 1, 0, 0, 2, 1, 1, 2]]).repeat(2, 1)
    labels = ids.clone()
    labels[:, :7] = -100
    labels[0, 9] = -100
    score = model.token_nll(ids, labels=labels, estimator="exact")
    assert torch.equal(score.mask, (labels != -100).float())
    # Three tokens of a block: the integral over t becomes a sum over seven masks.
    expected = sum(
        subset_nll(model, ids[:1], subset)[list(subset)].sum() / (size * math.comb(3, size))
        for size in (1, 2, 3)
        for subset in itertools.combinations((7, 8, 10), size)
    )
    assert score.nll[0].sum().item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", [*(model_class for model_class, _ in CLASSES.values()), SSDLMForMaskedLM])
def test_every_model_family_implements_the_protocol_explicitly(family):
    members = {name for name in (*vars(LanguageModel), *LanguageModel.__annotations__) if not name.startswith("_")}
    assert members >= {"token_nll", "generate", "has_likelihood", "exact_likelihood", "generator_per_row"}
    assert not [name for name in members - {"config", "generation_config"} if not hasattr(family, name)]
    if family.has_likelihood:
        assert inspect.signature(family.token_nll) == inspect.signature(LikelihoodMixin.token_nll)
