"""Published block-diffusion decoders equal their stock class under the mask they were trained with, both ways."""

import json

import decoders
import pytest
import torch
from safetensors.torch import load_file
from shared_models import Attack
from test_cli import assert_refused
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.foreign_layouts import UNREADABLE, adopt_published_decoding
from bd3lm_hf.hub_upload.convert import convert, to_decoder
from bd3lm_hf.tokenization import load_tokenizer


MASK, BLOCK = 300, 4
IDS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {**decoders.SIZES, **IDS, "rope_theta": 500.0}
SMALL = {"hidden_size": 4, "intermediate_size": 4}  # for models with a full vocabulary
STOCK = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
}
# What each project writes into config.json next to the fields of the stock decoder, and the stock decoder itself.
LAYOUTS = {
    "sdar": ("qwen3", {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": BLOCK}),
    "a2d-qwen3": ("qwen3", {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "block_size": BLOCK}),
    "a2d-qwen2": ("qwen2", {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"], "block_size": BLOCK}),
    "a2d-llama": ("llama", {"model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"], "block_size": BLOCK}),
    "opdlm": ("qwen3", {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}),
    "fast-dllm": (
        "qwen2",
        {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": BLOCK},
    ),
    "stable-diffcoder": ("llama", {"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"]}),
}


@pytest.fixture
def write(randomize, tmp_path):
    """A function `(layout, **fields of config.json) -> (folder, stock model)` that writes a published checkpoint.

    `sharpness` scales the logits, and the weights are written in files of at most `max_shard_size`.
    """

    def make(layout, sharpness=1.0, max_shard_size="1GB", **fields):
        family, own = LAYOUTS[layout]
        stock_class, config = STOCK[family]
        stock = randomize(stock_class(config), std=0.3).eval()
        with torch.no_grad():
            stock.base_model.norm.weight.mul_(sharpness)  # of the probabilities
        folder = tmp_path / layout
        stock.save_pretrained(folder, max_shard_size=max_shard_size)
        content = json.loads((folder / "config.json").read_text())
        content |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "mask_token_id": MASK}
        # As transformers 4 wrote them.
        content |= {"rope_theta": content.pop("rope_parameters")["rope_theta"], "torch_dtype": content.pop("dtype")}
        content |= {"rope_scaling": None, **own, **fields}
        (folder / "evil.py").write_text("raise RuntimeError('their code was run')")
        (folder / "config.json").write_text(json.dumps(content))
        return folder, stock

    return make


def stock_logits(stock, ids, masks):
    """Logits of a stock decoder in which query i sees key j iff `masks[i, j]`."""
    bias = torch.zeros(masks.shape).masked_fill(~masks, torch.finfo(torch.float32).min)[None, None]
    kinds = getattr(stock.config, "layer_types", None)
    positions = torch.arange(len(masks))[None]
    attention = dict.fromkeys(kinds, bias) if kinds else bias
    with torch.no_grad():
        return stock(ids, attention_mask=attention, position_ids=positions, use_cache=False).logits


def block_causal(length):
    block = torch.arange(length) // BLOCK
    return block[:, None] >= block[None]


IDS = torch.randint(3, 299, (1, 14), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_logits_are_those_of_the_stock_class_under_a_block_causal_mask(write, layout, tmp_path):
    folder, stock = write(layout, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    convert(str(folder), tmp_path / "ours")
    expected = stock_logits(stock, IDS, block_causal(IDS.shape[1]))
    if layout == "fast-dllm":  # the hidden state before a position predicts it
        expected = torch.cat([expected[:, :1], expected[:, :-1]], dim=1)
    models = [load_model(str(folder)), load_model(str(tmp_path / "ours"))]
    if layout != "stable-diffcoder":  # whose model type is that of the stock class
        models += [auto_class.from_pretrained(folder) for auto_class in (AutoModelForMaskedLM, AutoModelForCausalLM)]
    for model in models:
        config = model.config
        assert config.model_type == f"bd3lm_{LAYOUTS[layout][0]}"
        assert (config.block_size, config.mask_token_id, config.context) == (BLOCK, MASK, "block")
        assert config.alignment == ("shifted_noisy" if layout == "fast-dllm" else "same")
        assert model.generation_config.sampler == "confidence" and model.generation_config.confidence_threshold >= 0.9
        assert model.state_dict().keys() == stock.state_dict().keys()
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stock.state_dict().items())
        with torch.no_grad():
            logits = model(IDS).logits
        torch.testing.assert_close(logits[:, 1:], expected[:, 1:], atol=1e-4, rtol=1e-4)
    assert not (tmp_path / "ours" / "evil.py").exists()


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_greedy_decoding_equals_an_independent_loop_over_the_stock_class(write, layout):
    folder, stock = write(layout, sharpness=10.0)
    model, prompt, new = load_model(str(folder)).eval(), IDS[:, :6], 10
    model.generation_config.eos_token_id = None
    shifted, threshold, steps = layout == "fast-dllm", 0.95 if layout == "stable-diffcoder" else 0.9, 0
    ids = torch.cat([prompt, torch.full((1, new), MASK)], dim=1)
    while (ids == MASK).any():
        first = int((ids[0] == MASK).nonzero()[0])
        end = first // BLOCK * BLOCK + BLOCK
        scores = stock_logits(stock, ids[:, :end], block_causal(end))[0]
        if shifted:
            # The state before a block is that of the noisy stream, which equals the clean one after a finished block.
            scores = torch.cat([scores[:1], scores[:-1]])
        scores[:, [MASK, stock.config.pad_token_id]] = -torch.inf  # neither is ever written
        confidence, tokens = scores.softmax(-1).max(-1)
        masked = ids[0, :end] == MASK
        confidence = confidence.masked_fill(~masked, -1.0)
        reveal = (confidence > threshold) & masked
        reveal[confidence.argmax()] = True
        ids[0, :end][reveal] = tokens[reveal]
        steps += 1
    found = model.generate(prompt, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found.sequences, ids)
    assert 3 <= steps < new  # some steps reveal several tokens


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"mask_token_id": 320}, "mask_token_id=320"),
        ({"block_size": 0, "mask_token_id": 1}, "mask_token_id"),
        ({"block_size": "many"}, "block_size='many'"),
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "layers.1"),
        ({"hidden_size": 64}, "embed_tokens"),
        *(({"model_type": kind}, kind) for kind in UNREADABLE),
        ({"model_type": "sdarr", "auto_map": {}}, ""),  # the two commands have different errors
    ],
)
def test_an_invalid_checkpoint_is_refused_in_one_line(bd3lm, write, tmp_path, fields, part):
    folder, _ = write("sdar", **fields)
    for command in (("generate", "--model", folder, "--prompt", "A"), ("convert", folder, tmp_path / "ours")):
        assert_refused(bd3lm(*command), part)
    assert not (tmp_path / "ours").exists()


def test_an_index_that_names_a_foreign_or_missing_file_is_refused(bd3lm, write, tmp_path):
    folder, _ = write("sdar")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for file in ("../x.safetensors", "absent.safetensors"):
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for command in (("generate", "--model", folder, "--prompt", "A"), ("convert", folder, tmp_path / "ours")):
            assert_refused(bd3lm(*command), file)


def test_pickled_weights_are_read_if_they_are_only_tensors(bd3lm, write, tmp_path):
    folder, stock = write("sdar")
    (folder / "model.safetensors").unlink()
    torch.save(stock.state_dict(), folder / "pytorch_model.bin")
    assert bd3lm("convert", folder, tmp_path / "ours")[0] == 0
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in stock.state_dict().items())
    torch.save({**stock.state_dict(), "lm_head.weight": Attack(tmp_path / "touched")}, folder / "pytorch_model.bin")
    assert_refused(bd3lm("convert", folder, tmp_path / "other"), "not executed", "safetensors")
    assert_refused(bd3lm("generate", "--model", folder, "--prompt", "A"), "not executed", "safetensors")
    assert not (tmp_path / "touched").exists() and not (tmp_path / "other").exists()


@pytest.fixture
def with_tokenizer(write, tiny_tokenizer):
    """A function `(layout, **fields) -> folder` of a checkpoint that reads and writes text."""

    def make(layout, **fields):
        folder, _ = write(layout, mask_token_id=tiny_tokenizer.mask_token_id, **fields)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


def test_a_published_folder_or_a_link_to_it_is_scored_and_generates(bd3lm, with_tokenizer, tmp_path):
    folder, text = with_tokenizer("sdar"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "link").symlink_to(folder)
    results = []
    for model in (folder, tmp_path / "link"):
        code, out, err = bd3lm("generate", "--model", model, "--prompt", "A block", "--max-new-tokens", "6")
        assert code == 0 and out.strip(), err
        command = ("eval", "--model", model, "--dataset", text, "--max-sequences", "2", "--length", "32")
        code, out, err = bd3lm(*command, "--output", tmp_path / f"{model.name}.json")
        assert code == 0, err
        results.append(json.loads((tmp_path / f"{model.name}.json").read_text())["perplexity"])
    assert results[0] == results[1] > 1


@pytest.mark.parametrize(
    "layout", ["sdar", *(pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[1:])]
)
def test_a_published_checkpoint_is_trained_on_and_resumed(bd3lm, with_tokenizer, tmp_path, layout):
    folder, text = with_tokenizer(layout), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    fields = {"dataset": text, "model_length": 32, "save_steps": 1, "logging_steps": 1, "warmup_steps": 0}
    fields |= {"max_eval_samples": 2, "global_batch_size": 2, "per_device_train_batch_size": 2, "sample_tokens": 4}
    fields |= {"bf16": False, "gradient_checkpointing": False, "init_from": folder, "output_dir": tmp_path / "run"}
    words = [word for name, value in fields.items() for word in (f"--{name}", value)]
    for more in (["--max_steps", 2], ["--max_steps", 3, "--resume_from_checkpoint", "true"]):
        code, _, err = bd3lm("train", "adapt", *words, *more)
        assert code == 0, err
    trained = load_model(str(tmp_path / "run"))
    assert trained.config.block_size == BLOCK
    assert trained.config.alignment == ("shifted_noisy" if layout == "fast-dllm" else "same")
    assert (trained.generation_config.sampler, trained.config.context) == ("confidence", "block")
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_a_text_ends_at_the_end_tokens_of_the_folder_and_of_the_layout(write):
    folder, _ = write("fast-dllm", eos_token_id=7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "top_k": 20, "top_p": 0.8}))
    model = load_model(str(folder))
    found = model.generation_config
    assert (found.eos_token_id, found.top_k, found.top_p) == ([7, 8], 20, 0.8)
    model.config.vocab_size = 151_700  # so that it has the end tokens of Qwen
    adopt_published_decoding(model, folder)
    assert model.generation_config.eos_token_id == [7, 8, 151645, 151643]


def test_the_mask_token_comes_from_the_tokenizer_if_the_configuration_has_none(write, tiny_tokenizer, tmp_path):
    folder, _ = write("a2d-qwen3", mask_token_id=None, bos_token_id=4)
    with pytest.raises(ValueError, match="--mask-token-id"):
        convert(str(folder), tmp_path / "ours")
    for mask in (310, 0):
        named = tmp_path / f"mask-{mask}"
        assert convert(str(folder), named, mask_token_id=mask, block_size=8).model_type == "bd3lm_qwen3"
        config = load_model(str(named)).config
        assert (config.mask_token_id, config.block_size) == (mask, 8)
    tiny_tokenizer.save_pretrained(folder)
    convert(str(folder), tmp_path / "ours")
    assert load_model(str(tmp_path / "ours")).config.mask_token_id == tiny_tokenizer.mask_token_id


def test_a_tokenizer_without_a_mask_token_gets_that_of_the_contract(write, tiny_tokenizer):
    tiny_tokenizer.mask_token = None
    folder, _ = write("fast-dllm", mask_token_id=310)
    tiny_tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).mask_token_id == 310


def test_a_round_trip_to_sdar_gives_the_same_bits(write, tmp_path):
    folder, stock = write("sdar", vocab_size=151700, mask_token_id=151669, **SMALL)
    config = Qwen3Config(**{**SIZES, "vocab_size": 151700, **SMALL}, head_dim=8)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "model.safetensors").replace(folder / "model.safetensors")
    convert(str(folder), tmp_path / "ours")
    assert to_decoder(str(tmp_path / "ours"), tmp_path / "theirs", "sdar").model_type == "sdar"
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["architectures"] == ["SDARForCausalLM"] and written["block_size"] == BLOCK
    assert (written["rope_theta"], written["rope_scaling"], written["torch_dtype"]) == (500.0, None, "float32")
    assert "auto_map" not in written and not list((tmp_path / "theirs").glob("*.py"))
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "theirs"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    convert(str(tmp_path / "theirs"), tmp_path / "back")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "back")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("layout", "fields", "target", "part"),
    [
        ("a2d-llama", {}, "sdar", "model_type='bd3lm_qwen3'"),
        ("sdar", {}, "sdar", "mask_token_id=151669"),
        ("sdar", {"alignment": "shifted"}, "sdar", "alignment='same'"),
        ("sdar", {"context": "token"}, "sdar", "context='block'"),
        ("sdar", {}, "stock", "context='token'"),
        ("sdar", {"context": "token"}, "stock", "alignment='same' without ar_loss_weight"),
    ],
)
def test_a_model_that_does_not_fit_a_layout_is_refused(bd3lm, write, tmp_path, layout, fields, target, part):
    folder, _ = write(layout)
    if fields:
        convert(str(folder), tmp_path / "ours")
        folder = tmp_path / "ours"
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
    assert_refused(bd3lm("convert", folder, tmp_path / "out", "--to", target), part)
    assert not (tmp_path / "out").exists()


def test_fields_of_decoders_are_refused_for_other_checkpoints(bd3lm, model_folder, tmp_path):
    assert_refused(bd3lm("convert", model_folder, tmp_path / "out", "--block-size", "8"), "--block-size")
    assert_refused(bd3lm("convert", model_folder, tmp_path / "out", "--to", "sdar"), "--to sdar", "'bd3lm'")
