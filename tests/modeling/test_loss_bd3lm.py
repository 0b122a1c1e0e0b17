"""The loss: parity with the published one, what counts, what is masked, accumulation, precision."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from generating import make_family
from noisy_text import given_noise, gradients, masked_of, nll_of, random_ids
from published import GOLDEN, published_bd3lm
from shared_models import tiny_bd3lm
from torch.utils._python_dispatch import TorchDispatchMode

from bd3lm_hf.evaluation.perplexity import SequenceScore, summarize
from bd3lm_hf.modeling import loss_bd3lm
from bd3lm_hf.modeling.loss_bd3lm import corrupt, denoising_loss
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.noise_bd3lm import LogLinearNoise, Noise, noise_schedule, stratify


RECORDED = "02_bd3lm_loss"
PUBLISHED = json.loads((GOLDEN / "02_bd3lm_loss" / "config.json").read_text())
DRAWN = [name for name, case in PUBLISHED["cases"].items() if not case.get("resample") and "batches" not in case]
RESAMPLED = [name for name, case in PUBLISHED["cases"].items() if case.get("resample")]


# --- Parity with the published loss ----------------------------------------------------------------------------------


def golden_model(name: str) -> BD3LMForMaskedLM:
    case = PUBLISHED["cases"][name]
    model = published_bd3lm(case["block_size"], ignore_bos=case["ignore_bos"])
    model.sampling_eps_min.fill_(case["eps_min"])
    model.sampling_eps_max.fill_(case["eps_max"])
    return model.train(case["mode"] == "train")


def golden_noise(recorded: dict[str, torch.Tensor], name: str) -> Noise:
    uniform = recorded[f"{name}.u_t"]
    return Noise(stratify(uniform, order="published"), recorded[f"{name}.u_move"], torch.zeros_like(uniform))


@pytest.mark.parametrize("name", DRAWN)
def test_masks_and_probabilities_from_the_published_draws_equal_the_published_ones(recorded, name):
    case, model = PUBLISHED["cases"][name], golden_model(name)
    labels = recorded["x0"]
    interval = (case["eps_min"], case["eps_max"])
    masked, _, move_chance = masked_of(model, labels, noise=golden_noise(recorded, name), interval=interval)
    per_token = move_chance.repeat_interleave(case["block_size"], dim=1)
    torch.testing.assert_close(per_token, recorded[f"{name}.p"], rtol=0, atol=1e-7)
    assert torch.equal(torch.where(masked, 96, labels), recorded[f"{name}.model_input"][:, :32])


@pytest.mark.parametrize("name", DRAWN + RESAMPLED)
def test_losses_of_each_token_equal_the_published_ones(recorded, name):
    case, model = PUBLISHED["cases"][name], golden_model(name)
    x_t, x_0 = recorded[f"{name}.model_input"].split(32, dim=1)
    if name in RESAMPLED:
        weights = 1 / recorded[f"{name}.t"]
        rate = (recorded[f"{name}.xt_raw"] == 96).view(2, -1, case["block_size"]).double().mean(-1)
        assert rate.min() >= case["eps_min"] and rate.max() <= case["eps_max"]
    else:
        interval = (case["eps_min"], case["eps_max"])
        _, weights, _ = masked_of(model, x_0, noise=golden_noise(recorded, name), interval=interval)
    with torch.no_grad():
        nll = nll_of(model, x_t, x_0) * weights * recorded[f"{name}.token_mask"]
    torch.testing.assert_close(nll.float(), recorded[f"{name}.nlls"], rtol=2e-5, atol=2e-5)
    loss = nll.sum() / recorded[f"{name}.token_mask"].sum()
    torch.testing.assert_close(loss.float(), recorded[f"{name}.loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name in DRAWN if name != "bs4.pad"])
def test_the_loss_of_the_model_equals_the_published_one(recorded, name):
    # An interval other than [1e-3, 1] belongs to training, whose mean counts the first token too.
    model, x_0 = golden_model(name), recorded["x0"]
    whole = (PUBLISHED["cases"][name]["eps_min"], PUBLISHED["cases"][name]["eps_max"]) in ((1e-3, 1), (1, 1))
    model.train(model.training or not whole or name == "bs1.full")
    noise = golden_noise(recorded, name)._asdict()
    with torch.no_grad():
        total = model(input_ids=x_0, labels=x_0, num_items_in_batch=1, **noise).loss
        loss = model(input_ids=x_0, labels=x_0, **noise).loss
    torch.testing.assert_close(total, recorded[f"{name}.nlls"].sum(), rtol=1e-5, atol=0)
    counted = 64 if model.training else recorded[f"{name}.token_mask"].sum()
    torch.testing.assert_close(loss, total / counted, rtol=1e-6, atol=0)
    if whole and name != "bs1.full":
        torch.testing.assert_close(loss, recorded[f"{name}.loss"], rtol=1e-5, atol=0)


def test_gradients_equal_the_published_ones(recorded):
    model, x_0 = golden_model("bs4.train"), recorded["x0"]
    loss = model(input_ids=x_0, labels=x_0, **golden_noise(recorded, "bs4.train")._asdict()).loss
    torch.testing.assert_close(loss, recorded["bs4.train.loss"], rtol=1e-5, atol=0)
    found = gradients(model, loss)
    assert list(found) == PUBLISHED["gradient_order"]
    norms = torch.stack([g.double().norm() for g in found.values()])
    probes = torch.stack(
        [g.double().flatten() @ torch.linspace(-1, 1, g.numel(), dtype=torch.float64) for g in found.values()]
    )
    torch.testing.assert_close(norms, recorded["bs4.train.grad_norm"], rtol=2e-5, atol=1e-7)
    scale = recorded["bs4.train.grad_norm"] * torch.tensor([math.sqrt(g.numel() / 3) for g in found.values()])
    torch.testing.assert_close(probes / scale, recorded["bs4.train.grad_probe"] / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["bs4.val", "bs1.val"])
def test_published_validation_losses_are_ours_at_one_time_per_block(recorded, name):
    # The noise of these cases was not recorded. The masked tokens and each block's time can be read off the losses.
    # The time must be in its stratum: the published order assigns strata to the blocks row by row.
    model, size, compared = golden_model(name), PUBLISHED["cases"][name]["block_size"], 0
    for batch, (ids, mask) in enumerate(((recorded["x0"], "mask_ones"), (recorded["x0"].flip(0), "mask_pad"))):
        published = recorded[f"{name}.nlls"][batch].view(-1, size)
        with torch.no_grad():
            ours = nll_of(model, torch.where(published.view(2, 32) > 0, 96, ids), ids).view(-1, size)
        full = recorded[mask].view(-1, size).bool().all(-1)  # padding is part of a published block, not of ours
        for stratum in (full & (published > 0).any(-1)).nonzero().flatten().tolist():
            masked = ours[stratum] > 0
            times = ours[stratum][masked] / published[stratum][masked]
            torch.testing.assert_close(times, times[:1].expand_as(times), rtol=5e-5, atol=0)
            assert math.floor((times[0].item() - 1e-3) / (1 - 1e-3) * len(published)) == stratum
            compared += 1
    assert compared >= 20


@pytest.mark.parametrize("name", ["bs4.val", "bs1.val"])
def test_validation_losses_are_combined_as_published(recorded, name):
    nll, mask = recorded[f"{name}.nlls"], recorded[f"{name}.token_mask"]
    for batch in range(2):
        mean = nll[batch].sum() / mask[batch].sum()
        torch.testing.assert_close(mean, recorded[f"{name}.batch_loss"][batch], rtol=1e-6, atol=0)
    rows = zip(nll.flatten(0, 1).double().sum(1).tolist(), mask.flatten(0, 1).sum(1).long().tolist(), strict=True)
    summary = summarize(SequenceScore(row, *score) for row, score in enumerate(rows))
    assert summary.num_tokens == int(mask.sum())
    assert summary.nll == pytest.approx(recorded[f"{name}.nll"].item(), rel=1e-6)
    assert summary.bits_per_token == pytest.approx(recorded[f"{name}.bpd"].item(), rel=1e-6)
    assert summary.perplexity == pytest.approx(recorded[f"{name}.ppl"].item(), rel=1e-5)


# --- The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_weighted_cross_entropy_of_the_masked_tokens(tiny_model, implementation, training):
    tiny_model.set_attn_implementation(implementation)
    tiny_model.train(training)
    ids, noise = random_ids(3, 18), given_noise(3, 5, 18)
    mask = torch.ones(3, 18, dtype=torch.long)
    mask[0, :3] = 0
    masked, weights, _ = masked_of(tiny_model, ids, mask, Noise(**noise))
    with torch.no_grad():
        nll = nll_of(tiny_model, torch.where(masked, 47, ids), ids, attention_mask=mask)
        loss = tiny_model(input_ids=ids, labels=ids, attention_mask=mask, **noise).loss
    counted = int(mask.sum()) - (0 if training else 3)
    torch.testing.assert_close(loss, ((nll * weights).sum() / counted).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", ["square", "square_root", "log", "cosine"])
def test_the_loss_takes_probability_and_weight_from_the_schedule(schedule):
    model = tiny_bd3lm(noise=schedule)
    ids, noise = random_ids(2, 16), given_noise(2, 4, 16)
    level = noise_schedule(schedule)(noise["block_noise"] * (1 - 1e-3) + 1e-3)
    move_chance, weight = (x.repeat_interleave(4, dim=1) for x in (level.move_chance, -level.loss_scaling))
    masked = noise["token_noise"] <= move_chance
    masked[:, 0] = False
    with torch.no_grad():
        nll = nll_of(model, torch.where(masked, 47, ids), ids)
        loss = model(input_ids=ids, labels=ids, **noise).loss
    torch.testing.assert_close(loss, ((nll * weight).sum() / 30).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("block_size", [4, 32])
def test_a_time_conditioned_loss_feeds_the_noise_level_of_the_first_block_of_each_row(block_size):
    model = tiny_bd3lm(std=0.3, time_conditioning=True, block_size=block_size)  # so that the noise level matters
    ids, noise = random_ids(3, 16), given_noise(3, model.config.num_blocks(16), 16)
    masked, weights, move_chance = masked_of(model, ids, noise=Noise(**noise))
    sigma = LogLinearNoise().sigma(move_chance)
    with torch.no_grad():
        nll = nll_of(model, torch.where(masked, 47, ids), ids, timesteps=sigma[:, 0])
        loss = model(input_ids=ids, labels=ids, **noise).loss
        other = nll_of(model, torch.where(masked, 47, ids), ids, timesteps=sigma[:, -1].flip(0))
    torch.testing.assert_close(loss, ((nll * weights).sum() / 45).float(), rtol=1e-5, atol=0)
    assert abs((other * weights).sum() / (nll * weights).sum() - 1) > 1e-3


@pytest.mark.parametrize("rows", [2, 3])
def test_a_batch_with_one_masked_token_has_gradients_under_time_conditioning(rows):
    # Noise repeats when a run is resumed, so a failure here would come again and again.
    model = tiny_bd3lm(time_conditioning=True).train()
    ids, labels = random_ids(rows, 8), torch.full((rows, 8), -100)
    labels[1, 5] = ids[1, 5]
    noise = given_noise(rows, 2, 8)
    noise["token_noise"][1, 5] = 0.0  # below every mask rate
    loss = model(input_ids=ids, labels=labels, **noise).loss
    loss.backward()
    assert loss > 0 and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_training_draws_as_configured_from_the_interval_and_evaluation_once_from_all(tiny_model, monkeypatch):
    tiny_model.config.noise_draws = 3
    tiny_model.set_interval(0.3, 0.4)
    ids, found = random_ids(4, 32), []
    record = lambda *arguments: found.append(corrupt(*arguments)) or found[-1]  # noqa: E731
    monkeypatch.setattr(loss_bd3lm, "corrupt", record)
    for training in (True, False):
        with torch.no_grad():
            tiny_model.train(training)(input_ids=ids, labels=ids)
    assert [drawn.masked.shape[1] for drawn in found] == [3 * 32, 32]
    probability, of_evaluation = (drawn.move_chance for drawn in found)
    assert probability.min() >= 0.3 and probability.max() <= 0.4
    assert of_evaluation.min() < 0.1 and of_evaluation.max() > 0.9


def test_resampling_truncates_the_mask_rates_of_training_only(tiny_config):
    tiny_config.resample, tiny_config.block_size = True, 16
    model = BD3LMForMaskedLM(tiny_config)
    ids = random_ids(64, 32)
    tiny_config.ignore_bos = False

    def rates(training: bool) -> torch.Tensor:
        masked, _, _ = masked_of(model.train(training), ids, interval=(0.5, 0.6))
        return masked.view(64, 2, 16).double().mean(-1)

    torch.manual_seed(0)
    assert rates(True).min() >= 0.5 and rates(True).max() <= 0.6
    assert rates(False).min() < 0.45 and rates(False).max() > 0.65


def test_context_is_never_masked_and_never_scored_but_read(tiny_model):
    ids = random_ids(2, 16)
    labels = ids.clone()
    labels[:, :6] = -100  # ends inside the second block
    labels[1, 10] = -100
    noise = Noise(torch.ones(2, 4), torch.zeros(2, 16), torch.zeros(2, 4))  # masks everything maskable
    for training in (True, False):
        masked, _, _ = masked_of(tiny_model.train(training), labels, noise=noise)
        assert torch.equal(masked, labels != -100)
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 5) % 47
    with torch.no_grad():
        losses = [tiny_model(input_ids=x, labels=labels, **noise._asdict()).loss for x in (ids, changed)]
        score = tiny_model.token_nll(ids, labels=labels, estimator="exact")
    assert abs(losses[0] - losses[1]) > 1e-6
    assert torch.equal(score.mask, (labels != -100).float())
    assert not score.nll[labels == -100].any() and (score.nll[labels != -100] > 0).all()


def test_labels_that_differ_from_the_input_are_the_targets(tiny_model):
    ids, noise = random_ids(2, 8), given_noise(2, 2, 8)
    other = (ids + 7) % 47
    masked, weights, _ = masked_of(tiny_model, other, noise=Noise(**noise))
    with torch.no_grad():
        x_t = torch.where(masked, 47, ids)
        logits = tiny_model(input_ids=x_t, clean_input_ids=ids).logits
        logits[..., 47] = -torch.inf
        nll = F.cross_entropy(logits.transpose(1, 2), other, reduction="none")
        loss = tiny_model(input_ids=ids, labels=other, **noise).loss
    torch.testing.assert_close(loss, (nll * weights)[masked].sum() / 14, rtol=1e-5, atol=0)


@pytest.mark.parametrize("noise", [None, {"block_noise": torch.zeros(2, 2), "token_noise": torch.ones(2, 8)}])
def test_a_batch_with_nothing_to_score_has_a_loss_of_zero_and_a_gradient(tiny_model, noise):
    ids = random_ids(2, 8)
    labels = ids if noise else torch.full_like(ids, -100)
    loss = tiny_model.train()(input_ids=ids, labels=labels, **(noise or {})).loss
    assert loss.item() == 0
    loss.backward()
    assert all(not p.grad.any() for p in tiny_model.parameters() if p.grad is not None)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_the_loss_under_autocast_is_finite_and_close(tiny_model, dtype, tolerance, draws):
    tiny_model.train()
    ids, noise = random_ids(4, 16), given_noise(4, 4, 16, draws=draws)
    exact = tiny_model(input_ids=ids, labels=ids, **noise).loss
    expected = gradients(tiny_model, exact)
    with torch.autocast("cpu", dtype=dtype):
        loss = tiny_model(input_ids=ids, labels=ids, **noise).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=tolerance, atol=0)
    for name, gradient in gradients(tiny_model, loss).items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 5 * tolerance, name


def test_a_bfloat16_model_trains_with_a_finite_loss_even_at_large_logits(tiny_model):
    ids, noise = random_ids(4, 16), given_noise(4, 4, 16)
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight.mul_(300)
        exact = tiny_model(input_ids=ids, labels=ids, **noise).loss
    model = tiny_model.to(torch.bfloat16).train()
    model.sampling_eps_min.fill_(1e-3)
    loss = model(input_ids=ids, labels=ids, **noise).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss * 64 / 60, exact, rtol=0.05, atol=0)
    assert all(g.isfinite().all() and g.dtype == torch.bfloat16 for g in gradients(model, loss).values())


# --- Accelerators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "interval"),
    [
        ({}, (1e-3, 1.0)),
        ({"noise_draws": 2}, (0.3, 0.8)),
        ({"resample": True}, (0.25, 0.75)),
        ({"masking": "exact_k"}, (1e-3, 1.0)),
        ({"complementary": True}, (1e-3, 1.0)),
        ({"block_size": 1}, (1.0, 1.0)),
    ],
    ids=str,
)
def test_a_step_that_does_not_wait_for_the_device_has_the_same_loss_and_gradients(monkeypatch, fields, interval):
    # That it does not wait is shown by test_accelerators.py.
    model, ids, found = tiny_bd3lm(**fields).train(), random_ids(16, 32), []
    labels = ids.clone()
    labels[:4, :9] = -100
    for waits in (True, False):
        torch.manual_seed(3)
        monkeypatch.setattr(loss_bd3lm, "may_read", lambda device, waits=waits: waits)
        loss = denoising_loss(model, ids, labels, interval=interval)
        found.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_noise_that_masks_more_than_expected_gives_nan_without_a_wait(tiny_model, monkeypatch):
    ids = random_ids(32, 32)
    noise = Noise(torch.full((32, 8), 0.01), torch.zeros(32, 32), torch.zeros(32, 8))
    for waits in (True, False):
        monkeypatch.setattr(loss_bd3lm, "may_read", lambda device, waits=waits: waits)
        loss = denoising_loss(tiny_model.train(), ids, ids, noise=noise, interval=(1e-3, 0.1))
        assert loss.isfinite() == waits


def test_the_interval_is_read_from_the_device_only_after_a_change(tiny_model, monkeypatch):
    tiny_model.set_interval(0.25, 0.75)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__float__", lambda tensor: pytest.fail("a number was read from the device"))
        assert tiny_model.interval() == (0.25, 0.75)
    tiny_model.load_state_dict({**tiny_model.state_dict(), "sampling_eps_min": torch.tensor(0.5)})
    assert tiny_model.interval() == (0.5, 0.75)


def test_the_head_multiplies_in_the_precision_of_autocast(tiny_model):
    dtypes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._schema.name
            if name in ("aten::mm", "aten::addmm", "aten::addmm_") and any(
                48 in x.shape for x in args[:3] if torch.is_tensor(x)
            ):
                dtypes.append(args[-1].dtype)
            return function(*args, **(kwargs or {}))

    ids = random_ids(4, 16)
    with Products(), torch.autocast("cpu", torch.bfloat16):
        tiny_model.train()(input_ids=ids, labels=ids).loss.backward()
    assert len(dtypes) >= 3 and set(dtypes) == {torch.bfloat16}


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bd3lm", "mdlm", "sedd", "ar"])
def family(request):
    """Return a tiny model of each family with a likelihood; 48 ids, mask 47."""
    return make_family(request.param, model_length=16)


TEXT = random_ids(2, 9)
WITH_MASK = TEXT.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(47))


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (TEXT, TEXT[:, 1:], r"labels of shape \(2, 8\).*\(2, 9\)"),
        (WITH_MASK, WITH_MASK, "input_ids contain mask_token_id=47.*mlm=False"),
        (WITH_MASK, WITH_MASK.masked_fill(WITH_MASK == 47, -100), "input_ids contain mask_token_id=47.*mlm=False"),
        (TEXT[:, :-1], TEXT[:, 1:], "shifted by one.*labels=input_ids"),
        (TEXT[:, :-1], F.pad(TEXT[:, 1:-1], (0, 1), value=-100), "shifted by one.*labels=input_ids"),
    ],
)
def test_labels_that_are_not_those_of_the_text_are_refused(family, ids, labels, message):
    for call in (lambda: family.train()(ids, labels=labels), lambda: family.eval().token_nll(ids, labels=labels)):
        with pytest.raises(ValueError, match=message):
            call()


def test_labels_that_differ_from_the_input_are_also_scored_by_token_nll_and_a_trainers_evaluation(family):
    ids, shift = random_ids(2, 16, seed=1), torch.arange(16) % 2
    labels = (ids + 7 * shift) % 47
    generators = [[torch.Generator().manual_seed(seed) for seed in (0, 1)] for _ in range(2)]
    with torch.no_grad():
        for score in (
            lambda labels: family.eval()(ids, labels=labels, num_items_in_batch=32).nll,
            lambda labels: family.token_nll(ids, labels=labels, generator=generators.pop()).nll,
        ):
            changed = score(ids) != score(labels)
            assert changed.any() and not changed[:, shift == 0].any()


def test_a_loss_outside_the_model_is_refused(family):
    with pytest.raises(ValueError, match="label_smoothing_factor or compute_loss_func"):
        family.train()(input_ids=random_ids(2, 8), num_items_in_batch=torch.tensor(16))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_is_the_mask_token_is_neither_checked_nor_scored(family, side):
    text = random_ids(1, 8)
    padding = (3, 0) if side == "left" else (0, 3)
    ids, mask = F.pad(text, padding, value=47), F.pad(torch.ones_like(text), padding)
    for estimator in family.estimators:
        alone, padded = (
            family.token_nll(*inputs, estimator=estimator, generator=[torch.Generator().manual_seed(3)])
            for inputs in ((text,), (ids, mask))
        )
        assert not padded.mask[mask == 0].any() and not padded.nll[mask == 0].any()
        torch.testing.assert_close(padded.nll[mask == 1], alone.nll[0], rtol=1e-4, atol=1e-5)
    family.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("draws", "name", "shape", "expected"),
    [
        *((1, name, None, "") for name in ("block_noise", "token_noise", "count_noise")),
        (1, "block_noise", (2, 3), (2, 2)),
        (1, "token_noise", (2, 9), (2, 8)),
        (1, "count_noise", (1, 2), (2, 2)),
        (3, "block_noise", (2, 3, 3), (2, 3, 2)),
        (3, "block_noise", (2, 0, 2), (2, 2)),
        (3, "token_noise", (2, 2, 8), (2, 3, 8)),
        (3, "token_noise", (2, 8), (2, 3, 8)),
        (3, "count_noise", (2, 2), (2, 3, 2)),
    ],
)
def test_noise_that_is_incomplete_or_of_another_shape_is_refused(tiny_config, draws, name, shape, expected):
    tiny_config.resample, tiny_config.sampling_eps_min = True, 0.5
    model, ids = BD3LMForMaskedLM(tiny_config).train(), random_ids(2, 8)
    noise = given_noise(2, 2, 8, draws=draws)
    del noise[name]
    message = name
    if shape is not None:
        noise[name] = torch.rand(shape)
        message = re.escape(f"{name} of shape {shape} does not fit this batch: pass {expected}")
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, labels=ids, **noise)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_loss_takes_batches_of_varying_lengths(make_model):
    compiled = torch.compile(make_model(n_blocks=1), backend="eager")
    for length in (8, 12, 20, 15):
        ids = torch.arange(5, 5 + length)[None].repeat(2, 1)
        assert torch.isfinite(compiled(ids, labels=ids).loss)
