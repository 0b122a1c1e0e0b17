"""The model: parity with the published one, initialisation, saving and loading, precision, compilation, bad input."""

import functools
import json
import math

import pytest
import torch
from noisy_text import gradients, random_ids, some_masked
from published import GOLDEN, published_bd3lm
from safetensors.torch import load_file, save_file
from shared_models import tiny_bd3lm
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache

import bd3lm_hf  # noqa: F401  (registers the Auto classes)
from bd3lm_hf.modeling.backbone_bd3lm import BD3LMModel
from bd3lm_hf.modeling.cache_bd3lm import BlockCache
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.noise_bd3lm import draw_noise


RECORDED = "01_bd3lm"
VARIANTS = json.loads((GOLDEN / RECORDED / "config.json").read_text())["variants"]
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def golden_model(variant: str, block_size: int) -> BD3LMForMaskedLM:
    return published_bd3lm(**{**VARIANTS[variant]["constructor"], "block_size": block_size})


# --- Parity with the published model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "variant, block_size", [(name, size) for name, v in VARIANTS.items() for size in v["block_sizes"]]
)
def test_noisy_logits_equal_the_published_ones(recorded, variant, block_size, implementation):
    model = golden_model(variant, block_size)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = model(input_ids=recorded["xt"], clean_input_ids=recorded["x0"], timesteps=recorded["sigma"]).logits
    torch.testing.assert_close(logits, recorded[f"{variant}.bs{block_size}.logits"], **TOLERANCE)


@pytest.mark.parametrize("variant", ["adaln", "noadaln"])
@pytest.mark.parametrize("block_size", [1, 4, 8, 16])
def test_block_causal_logits_equal_the_published_ones(recorded, variant, block_size):
    with torch.no_grad():
        logits = golden_model(variant, block_size)(recorded[f"bs{block_size}.sample_ids"]).logits
    torch.testing.assert_close(logits, recorded[f"{variant}.bs{block_size}.sample_logits_nocache"], **TOLERANCE)


@pytest.mark.parametrize("cache_class", [BlockCache, DynamicCache])
@pytest.mark.parametrize("variant", ["adaln", "noadaln"])
@pytest.mark.parametrize("block_size", [1, 4, 8, 16])
def test_cached_logits_equal_the_published_ones(recorded, variant, block_size, cache_class):
    model, cache, found = golden_model(variant, block_size), cache_class(), []
    with torch.no_grad():
        for block in recorded[f"bs{block_size}.sample_ids"].split(block_size, dim=1):
            model(torch.full_like(block, 96), past_key_values=cache, use_cache=False)
            found.append(model(block, past_key_values=cache, use_cache=True).logits)
            assert cache.get_seq_length() == block_size * len(found)  # a denoising step leaves no trace
    expected = recorded[f"{variant}.bs{block_size}.sample_logits_cache"]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **TOLERANCE)


@pytest.mark.parametrize("variant", ["adaln", "noadaln"])
def test_hidden_states_equal_the_published_ones(recorded, variant):
    streams = {"input_ids": recorded["xt"], "clean_input_ids": recorded["x0"]}
    with torch.no_grad():
        output = golden_model(variant, 4)(**streams, output_hidden_states=True)
    compared = [name for name in recorded if name.startswith(f"{variant}.bs4.hidden.")]
    assert len(compared) >= 2 and len(output.hidden_states) == 3
    for name in compared:
        found = output.hidden_states[int(name.rpartition(".")[2])]
        torch.testing.assert_close(found[:1], recorded[name], **TOLERANCE)


def test_a_published_folder_loads_with_no_missing_and_no_unexpected_key(recorded, tmp_path):
    constructor = {**VARIANTS["adaln"]["constructor"], "block_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({**constructor, "model_type": "bd3lm", "return_dict": False}))
    weights = load_file(GOLDEN / RECORDED / "weights.safetensors")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert model.interval() == pytest.approx((0.45, 0.95))
    with torch.no_grad():
        logits = model(input_ids=recorded["xt"], clean_input_ids=recorded["x0"]).logits
    torch.testing.assert_close(logits, recorded["adaln.bs8.logits"], **TOLERANCE)


def test_the_published_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = BD3LMForMaskedLM(BD3LMConfig())
    assert sum(p.numel() for p in model.parameters()) == 169_627_218
    assert len(model.state_dict()) == 133


# --- Initialisation --------------------------------------------------------------------------------------------------


def assert_published_initialisation(model: torch.nn.Module, part: str = "") -> None:
    names = [name for name, _ in model.named_parameters()]
    zero = [name for name in names if "adaLN_modulation" in name or "output_layer.linear" in name]
    assert len(zero) == 2 * (model.config.n_blocks + 2)
    for name, parameter in model.named_parameters():
        if part not in name:
            continue
        if name in zero:
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.dim() == 2:
            # kaiming_uniform(a=sqrt(5)): uniform within 1 / sqrt(fan_in); the fan-in of the embedding is its width.
            bound = 1 / math.sqrt(parameter.shape[1])
            assert 0.95 * bound < parameter.abs().max() <= bound * 1.0001, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
        else:
            fan_in = model.get_parameter(name.removesuffix("bias") + "weight").shape[1]
            assert 0 < parameter.abs().max() <= 1 / math.sqrt(fan_in) * 1.0001, name


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM])
def test_a_new_model_is_initialised_as_published_and_gives_uniform_logits(tiny_config, auto_class):
    model = auto_class.from_config(tiny_config).eval()
    assert type(model) is (BD3LMModel if auto_class is AutoModel else BD3LMForMaskedLM)
    assert_published_initialisation(model)
    ids = random_ids(2, 12)
    with torch.no_grad():
        for output in (model(ids), model(input_ids=some_masked(ids), clean_input_ids=ids)):
            if auto_class is AutoModel:
                hidden = output.last_hidden_state
                torch.testing.assert_close(hidden.std(-1, correction=0), torch.ones(2, 12), rtol=0.02, atol=0)
            else:
                assert output.logits.shape == (2, 12, 48) and not output.logits.any()


@pytest.mark.parametrize("dropped", ["adaLN_modulation", "output_layer.linear", "mlp", "vocab_embed", "norm"])
def test_what_a_checkpoint_lacks_is_initialised_as_published(tiny_model, tmp_path, dropped):
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if dropped not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = BD3LMForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(weights) - set(kept)
    for name, value in kept.items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert_published_initialisation(loaded, dropped)


def test_without_var_min_the_interval_is_the_config_and_no_buffer(tiny_config):
    tiny_config.var_min, tiny_config.sampling_eps_max = False, 0.75
    model = BD3LMForMaskedLM(tiny_config)
    assert not any("sampling_eps" in name for name in model.state_dict())
    assert model.interval() == (1e-3, 0.75)
    model.set_interval(0.3, 0.8)
    assert model.interval() == (0.3, 0.8)


# --- Saving and loading ----------------------------------------------------------------------------------------------


def test_a_model_made_on_the_meta_device_is_complete_once_its_weights_are_loaded(tiny_model):
    with torch.device("meta"):
        model = BD3LMForMaskedLM(tiny_model.config)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict(tiny_model.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, tiny_model(ids).logits)


# --- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotary_angles_stay_exact_at_large_positions_after_a_cast(tiny_model, dtype):
    rotary = tiny_model.to(dtype).backbone.rotary_emb
    positions = torch.tensor([[0, 1, 1000, 1023, 100_003]])
    cos, sin = rotary(positions, torch.float32)
    pairs = tiny_model.config.head_dim // 2
    for index, position in enumerate(positions[0].tolist()):
        angles = [position * 10000.0 ** (-i / pairs) for i in range(pairs)]
        for found, function in ((cos, math.cos), (sin, math.sin)):
            expected = torch.tensor([function(angle) for angle in angles])
            torch.testing.assert_close(found[0, index, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_noisy_stream_and_the_cache_work_in_half_precision(tiny_model, dtype):
    ids = random_ids(2, 12)
    with torch.no_grad():
        exact = tiny_model(input_ids=some_masked(ids), clean_input_ids=ids).logits
        exact_nll = tiny_model.token_nll(ids, estimator="exact").nll
        model = tiny_model.to(dtype)
        cast = model(input_ids=some_masked(ids), clean_input_ids=ids).logits
        cache = model(ids[:, :8], use_cache=True).past_key_values
        step = model(ids[:, 8:], past_key_values=cache, use_cache=False).logits
        nll = model.token_nll(ids, estimator="exact").nll
    assert ((cast.float() - exact).abs().mean() / exact.std()).item() < 0.05
    torch.testing.assert_close(step.float(), model(ids).logits[:, 8:].float(), rtol=0, atol=0.05)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, exact_nll, rtol=0, atol=0.1)


def test_the_norm_is_computed_in_float32(tiny_model):
    norm = tiny_model.backbone.blocks[0].norm1.to(torch.bfloat16)
    x = (torch.randn(4, 32) * 3 + 100).to(torch.bfloat16)
    expected = torch.nn.functional.layer_norm(x.float(), (32,)) * norm.weight.float()
    assert torch.equal(norm(x), expected.to(torch.bfloat16))


# --- Compilation and checkpointing -----------------------------------------------------------------------------------


def test_a_forward_pass_of_one_or_two_streams_and_a_cached_step_compile_as_one_graph(tiny_model, fresh_compiler):
    compiled = torch.compile(tiny_model, fullgraph=True, backend="eager")
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        for arguments in ({"input_ids": ids}, {"input_ids": some_masked(ids), "clean_input_ids": ids}):
            found, expected = (model(**arguments, attention_mask=mask).logits for model in (compiled, tiny_model))
            torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
        cache = tiny_model(ids[:, :8], use_cache=True).past_key_values
        found = compiled(ids[:, 8:], past_key_values=cache, use_cache=False).logits
        torch.testing.assert_close(found, tiny_model(ids).logits[:, 8:], rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(tiny_model, use_reentrant):
    tiny_model.train()
    ids, noise = random_ids(2, 12), draw_noise(2, 3, 12, num_noise_samples=2)._asdict()
    found, calls = [], []
    tiny_model.backbone.blocks[0].norm2.register_forward_hook(lambda *arguments: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            tiny_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        calls.clear()
        loss = tiny_model(input_ids=ids, labels=ids, **noise).loss
        found.append((loss, gradients(tiny_model, loss)))
        assert len(calls) == (2 if checkpointing else 1)  # the layer is computed again in the backward pass
    assert torch.equal(found[0][0], found[1][0]) and all(gradient.any() for gradient in found[0][1].values())
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-8)


# --- Embeddings ------------------------------------------------------------------------------------------------------


def test_a_larger_vocabulary_keeps_the_mask_and_the_old_logits(tiny_model, tmp_path):
    ids = random_ids(2, 12)
    with torch.no_grad():
        before = tiny_model(input_ids=some_masked(ids), clean_input_ids=ids).logits
        tiny_model.resize_token_embeddings(61)
        after = tiny_model(input_ids=some_masked(ids), clean_input_ids=ids).logits
    assert after.shape == (2, 12, 61)
    torch.testing.assert_close(after[..., :48], before, rtol=0, atol=1e-6)
    assert (tiny_model.config.vocab_size, tiny_model.config.mask_token_id) == (61, 47)
    tiny_model.save_pretrained(tmp_path)
    loaded, report = BD3LMForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and loaded.config.mask_token_id == 47
    assert loaded.train()(input_ids=ids, labels=torch.full_like(ids, 60)).loss.isfinite()


@pytest.mark.parametrize("tokens", [47, 10])
def test_a_vocabulary_without_the_mask_is_refused(tiny_model, tokens):
    message = rf"resize_token_embeddings\({tokens}\) would drop mask_token_id=47: keep at least 48"
    with pytest.raises(ValueError, match=message):
        tiny_model.resize_token_embeddings(tokens)
    assert tiny_model.get_input_embeddings().weight.shape[0] == 48


def test_a_vocabulary_can_shrink_after_the_mask():
    model = tiny_bd3lm(mask_token_id=3)
    ids = torch.randint(4, 30, (1, 8))
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(30)
        torch.testing.assert_close(model(ids).logits, before[..., :30], rtol=0, atol=1e-6)


def test_parameters_are_counted_with_and_without_the_embedding_table(tiny_model):
    table = tiny_model.get_input_embeddings().embedding
    assert tiny_model.num_parameters() - tiny_model.num_parameters(exclude_embeddings=True) == table.numel()
    table.requires_grad_(False)
    trained = tiny_model.num_parameters(only_trainable=True)
    assert trained == tiny_model.num_parameters(only_trainable=True, exclude_embeddings=True)


# --- The forward pass's arguments ------------------------------------------------------------------------------------


def test_embeddings_a_tuple_and_an_unused_noise_level_give_the_same_logits(tiny_model):
    ids = random_ids(2, 8)
    with torch.no_grad():
        output = tiny_model(ids)
        assert output.hidden_states is None
        embeds = tiny_model.get_input_embeddings()(ids)
        assert torch.equal(tiny_model(inputs_embeds=embeds).logits, output.logits)
        found = tiny_model(ids, return_dict=False)
        assert isinstance(found, tuple) and torch.equal(found[0], output.logits)
        assert isinstance(tiny_model.backbone(ids, return_dict=False), tuple)
        assert torch.equal(tiny_model(ids, timesteps=torch.tensor([0.1, 3.0])).logits, output.logits)


def test_a_time_conditioned_model_needs_noise_levels():
    with pytest.raises(ValueError, match="time_conditioning=True: pass timesteps, the noise levels sigma"):
        tiny_bd3lm(time_conditioning=True)(random_ids(2, 8))


def test_dropout_is_active_in_training_only():
    model = tiny_bd3lm(dropout=0.5).train()
    ids = random_ids(2, 8)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "exactly one of input_ids and inputs_embeds"),
        ({"clean_input_ids": random_ids(1, 8)}, r"clean_input_ids of shape \(1, 8\) .*noisy input, \(1, 4\)"),
        ({"clean_input_ids": random_ids(1, 4), "past_key_values": BlockCache()}, "clean_input_ids.*cache"),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**{"input_ids": random_ids(1, 4), **arguments})


@pytest.mark.parametrize("bad", [48, -1])
def test_ids_outside_the_vocabulary_are_refused_by_name(tiny_model, bad):
    ids, wrong = random_ids(1, 8), random_ids(1, 8)
    wrong[0, 5] = bad
    for name, call in (
        ("input_ids", lambda: tiny_model(wrong)),
        ("clean_input_ids", lambda: tiny_model(input_ids=ids, clean_input_ids=wrong)),
        ("input_ids", lambda: tiny_model(input_ids=wrong, labels=ids)),
        ("labels", lambda: tiny_model(input_ids=ids, labels=wrong)),
        ("input_ids", lambda: tiny_model.token_nll(wrong)),
    ):
        with pytest.raises(ValueError, match=f"^{name} contains the id {bad}, outside .*0 to 47.: use the tokenizer"):
            call()


@pytest.mark.parametrize(("past", "length", "padding"), [(0, 6, 0), (4, 3, 0), (4, 5, 0), (4, 4, 3)])
def test_part_of_a_block_is_read_but_not_stored(tiny_model, past, length, padding):
    ids, cache = random_ids(2, past + length), BlockCache()
    mask = torch.ones_like(ids)
    if past:
        tiny_model(ids[:, :past], past_key_values=cache, use_cache=True)
    mask[0, :padding] = 0  # this row ends inside a block
    last = {"input_ids": ids[:, past:], "attention_mask": mask, "past_key_values": cache}
    with pytest.raises(ValueError, match=rf"would store \[.*{past + length}\] tokens.*blocks of 4: .*use_cache=False"):
        tiny_model(**last, use_cache=True)
    assert tiny_model(**last, use_cache=False).logits.shape == (2, length, 48)


# --- The interval of noise levels ------------------------------------------------------------------------------------


def test_an_interval_that_is_set_is_saved_with_weights_and_config(tiny_model, tmp_path):
    tiny_model.sampling_eps_max.fill_(0.75)
    tiny_model.save_pretrained(tmp_path)
    saved = BD3LMConfig.from_pretrained(tmp_path)  # what the weights carry, and not the nearest float32
    assert (saved.sampling_eps_min, saved.sampling_eps_max) == (1e-3, 0.75)
    tiny_model.set_interval(0.3, 0.8)
    assert tiny_model.interval() == (pytest.approx(0.3), pytest.approx(0.8))
    tiny_model.save_pretrained(tmp_path)
    loaded = BD3LMForMaskedLM.from_pretrained(tmp_path)
    assert loaded.interval() == tiny_model.interval()
    assert (loaded.config.sampling_eps_min, loaded.config.sampling_eps_max) == (0.3, 0.8)
    assert BD3LMForMaskedLM(loaded.config).interval() == tiny_model.interval()


@pytest.mark.parametrize("interval", [(0.8, 0.3), (-0.1, 0.5), (0.5, 1.1), (0.0, 0.0)])
def test_an_invalid_interval_cannot_be_set(tiny_model, interval):
    before = tiny_model.interval()
    with pytest.raises(ValueError, match=f"sampling_eps_min={interval[0]}, sampling_eps_max={interval[1]}"):
        tiny_model.set_interval(*interval)
    tiny_model.config.resample = True
    with pytest.raises(ValueError, match="contains no mask rate k / 4"):
        tiny_model.set_interval(0.55, 0.7)
    assert tiny_model.interval() == before
    assert tiny_model.config.sampling_eps_max == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["loaded", "cast", "method"])
def test_half_precision_keeps_what_must_be_exact(tiny_model, tmp_path, dtype, how):
    tiny_model.set_interval(0.45, 0.95)
    expected, frequencies = tiny_model.interval(), tiny_model.backbone.rotary_emb.inv_freq.clone()
    tiny_model.save_pretrained(tmp_path)
    half = {torch.bfloat16: tiny_model.bfloat16, torch.float16: tiny_model.half}[dtype]
    loaded = functools.partial(BD3LMForMaskedLM.from_pretrained, tmp_path, dtype=dtype)
    model = {"loaded": loaded, "cast": lambda: tiny_model.to(dtype), "method": half}[how]()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.interval() == expected
    assert how != "loaded" or torch.equal(model.backbone.rotary_emb.inv_freq, frequencies)
    assert model.to("meta").sampling_eps_min.device.type == "meta"
