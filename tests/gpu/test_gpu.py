"""Tests on a CUDA device. `BD3LM_TEST_DEVICE=cpu` runs those that can run on a CPU."""

import os

import pytest
import torch
from transformers import AutoModelForMaskedLM, TextStreamer, Trainer, TrainingArguments

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM
from bd3lm_hf.modeling.cache_bd3lm import static_buffers


DEVICE = os.environ.get("BD3LM_TEST_DEVICE", "cuda")
CUDA = DEVICE.startswith("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_cuda)]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.fixture
def make(make_model):
    """Return a function that makes a seeded model on the device, with heads as wide as flex wants."""

    def build(implementation="eager", dtype=torch.float32, device=DEVICE, **fields):
        model = make_model(**{"hidden_dim": 64, "n_heads": 2, "model_length": 64, **fields})
        model.set_attn_implementation(implementation)
        return model.to(device, dtype)

    return build


def batch_of(device=DEVICE, length=32, padded=False):
    ids = torch.randint(3, 40, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : length // 4], mask[1, -length // 3 :] = 0, 0
    return ids.to(device), mask.to(device)


def noise_of(ids, block_size=4):
    generator = torch.Generator().manual_seed(2)
    blocks = -(-ids.shape[1] // block_size)
    return {
        "block_noise": torch.rand(ids.shape[0], blocks, generator=generator),
        "token_noise": torch.rand(*ids.shape, generator=generator),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_flex_equals_eager(make, dtype, padded):
    losses, gradients = [], []
    for implementation, precision in (("eager", torch.float32), ("eager", dtype), ("flex_attention", dtype)):
        model = make(implementation, precision, n_heads=1).train()  # one of 64, for which we choose the tiles
        ids, mask = batch_of(length=160, padded=padded)  # several tiles
        labels = ids.masked_fill(mask == 0, -100)
        with torch.set_grad_enabled(CUDA):  # flex has no backward pass on a CPU
            losses.append(model(input_ids=ids, attention_mask=mask, labels=labels, **noise_of(ids)).loss)
        if CUDA:
            losses[-1].backward()
            gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters()]))
    torch.testing.assert_close(losses[2], losses[1], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if CUDA:
        # Rounding to bfloat16 moves the gradients of such random weights by 12 to 78 %, whatever the attention.
        eager, flex = ((found - gradients[0]).norm() / gradients[0].norm() for found in gradients[1:])
        assert flex < 2 * eager + 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_a_compiled_training_step_equals_an_eager_one_without_recompiling(make, implementation):
    model = make(implementation if CUDA else "sdpa").train()
    ids, mask = batch_of(padded=True)
    run = torch.compile(model, backend="inductor" if CUDA else "eager", fullgraph=True)
    for seed in range(4):
        batch = {"input_ids": ids, "labels": ids, "attention_mask": mask.roll(seed, 0), **noise_of(ids.roll(seed))}
        results = []
        for step in (model, run):
            loss = step(**batch).loss
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            results.append((loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
        (expected, plain), (loss, gradient) = results
        torch.testing.assert_close(loss, expected)
        assert plain.norm() > 0 and (gradient - plain).norm() < 1e-3 * plain.norm()
        if seed == 1:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_seed_gives_the_same_noise_and_estimates_as_on_a_cpu(make):
    ids, _ = batch_of("cpu")
    for estimator in ("sampled", "stratified", "exact"):
        scores = [
            make(device=device).token_nll(
                ids.to(device), estimator=estimator, generator=torch.Generator().manual_seed(3)
            )
            for device in ("cpu", DEVICE)
        ]
        torch.testing.assert_close(scores[1].nll.cpu(), scores[0].nll, rtol=1e-3, atol=1e-3)
        assert torch.equal(scores[1].nll.cpu() == 0, scores[0].nll == 0)  # the same tokens were masked


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_agree_with_the_cpu(make, dtype):
    ids, mask = batch_of("cpu", padded=True)
    labels = ids.masked_fill(mask == 0, -100)
    expected = make(device="cpu").train()(input_ids=ids, attention_mask=mask, labels=labels, **noise_of(ids)).loss
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels, **noise_of(ids)}
    model = make(dtype=dtype).train()
    loss = model(**{name: tensor.to(DEVICE) for name, tensor in tensors.items()}).loss
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss.cpu().float(), expected, rtol=tolerance, atol=tolerance)


def test_greedy_text_of_a_trained_toy_is_that_of_the_cpu():
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "model_length": 32, "hidden_dim": 32, "n_blocks": 2, "n_heads": 2, "cond_dim": 8}
    model = BD3LMForMaskedLM(BD3LMConfig(**sizes, block_size=4)).train().to(DEVICE)
    text = torch.arange(32).remainder(10).repeat(8, 1).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    options = {"max_new_tokens": 20, "do_sample": False}
    here = model.generate(text[:1, :4], **options).cpu()
    assert torch.equal(here, model.cpu().generate(text[:1, :4].cpu(), **options))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "first_hitting"},
        {"sampler": "ancestral", "num_denoising_steps": 4},
        {"sampler": "confidence", "confidence_threshold": 0.3},
        {"sampler": "entropy_bound", "entropy_bound": 1.0},
        {"sampler": "first_hitting", "nucleus_p": 0.9},
        {"sampler": "first_hitting", "repetition_penalty": 1.2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_sampler_writes_with_every_cache(make, options, cache):
    model = make().eval()
    ids, mask = batch_of(length=9, padded=True)
    mask[1] = 1
    texts = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(4)
        given = {"max_new_tokens": 11, "do_sample": True, "generator": generator, "cache_implementation": cache}
        text = model.generate(ids, attention_mask=mask, **given, **options)
        assert text.shape == (3, 20) and not (text[:, 9:] == model.config.mask_token_id).any()
        texts.append(text)
    assert torch.equal(*texts)


def test_a_static_cache_gives_the_text_of_a_dynamic_one(make):
    model, (ids, mask) = make().eval(), batch_of(length=9)
    options = {"attention_mask": mask, "max_new_tokens": 23, "do_sample": False}
    assert torch.equal(
        model.generate(ids, cache_implementation="static", **options),
        model.generate(ids, cache_implementation="dynamic", **options),
    )


@needs_cuda
def test_a_compiled_step_serves_later_calls_in_the_same_memory(make):
    model, counts = make().eval(), []
    for length in (9, 9, 14):
        ids, mask = batch_of(length=length)
        options = {"attention_mask": mask, "max_new_tokens": 23, "do_sample": False}
        plain = model.generate(ids, cache_implementation="dynamic", **options)
        assert torch.equal(model.generate(ids, **options), plain)
        counts.append((torch._dynamo.utils.counters["stats"]["unique_graphs"], static_buffers(model).num_bytes))
    assert len(set(counts)) == 1


def test_streamers_and_stop_rules_on_the_device(make, tiny_tokenizer, capsys):
    model = make(vocab_size=len(tiny_tokenizer), mask_token_id=tiny_tokenizer.mask_token_id).eval()
    ids = torch.arange(10, 14, device=DEVICE)[None]
    model.generate(ids, max_new_tokens=8, do_sample=False, streamer=TextStreamer(tiny_tokenizer))
    assert capsys.readouterr().out
    text = model.generate(ids, max_new_tokens=16, do_sample=False)[0]
    stopped = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=int(text[7]))[0]
    assert stopped[-1] == text[7] and len(stopped) <= 8


def test_infilling_on_the_device(make):
    model, (ids, _) = make().eval(), batch_of(length=16)
    ids[:, 5:8] = model.config.mask_token_id
    filled = model.infill(ids, do_sample=False)
    assert torch.equal(filled[:, :5], ids[:, :5]) and not (filled == model.config.mask_token_id).any()


@needs_cuda
@pytest.mark.parametrize("inputs", ["text", "padding", "documents"])
def test_a_training_step_does_not_synchronise(make, inputs):
    model, (ids, mask) = make("flex_attention", torch.bfloat16).train(), batch_of(padded=inputs == "padding")
    positions = torch.cat([torch.arange(13, device=DEVICE), torch.arange(19, device=DEVICE)]).unsqueeze(0)
    batch = {"position_ids": positions} if inputs == "documents" else {"attention_mask": mask}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for attempt in range(2):
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            model(input_ids=ids, labels=ids, **batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # In the second step torch would have raised at the first read of a value.
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@needs_cuda
def test_device_map_auto_loads_and_writes(make, tmp_path):
    make(device="cpu").save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, device_map="auto", trust_remote_code=True)
    text = model.generate(torch.arange(3, 7, device=DEVICE)[None], max_new_tokens=8, do_sample=False)
    assert text.device.type == "cuda" and text.shape == (1, 12)


@needs_cuda
def test_a_resumed_run_in_bfloat16_repeats_the_uninterrupted_one(make, tmp_path):
    data = [{"input_ids": row.cpu(), "labels": row.cpu()} for row in batch_of(length=32)[0].repeat(8, 1)]

    def train(folder, **resume):
        arguments = TrainingArguments(
            folder, max_steps=6, save_steps=3, bf16=True, report_to=[], per_device_train_batch_size=4, logging_steps=1
        )
        trainer = Trainer(make(device="cpu").float(), arguments, train_dataset=data)
        trainer.train(**resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = train(tmp_path)
    resumed = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed[-3:] == pytest.approx(whole[-3:], rel=2e-2)


def test_weights_that_are_not_finite_give_a_loss_that_is_not_finite(make):
    model, (ids, _) = make().train(), batch_of()
    with torch.no_grad():
        model.get_output_embeddings().bias[3] = float("nan")
    assert not torch.isfinite(model(input_ids=ids, labels=ids).loss)
