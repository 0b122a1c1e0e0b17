"""adapt_decoder chooses a mask token, keeps the decoder's settings, and refuses decoders that it does not support."""

import io
import logging

import pytest
import torch
from decoders import random_ids, save_stock, tiny_stock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, PreTrainedTokenizerFast, T5Config
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

from bd3lm_hf import adapt_decoder
from bd3lm_hf.checkpoints import add_adapters, load_model
from bd3lm_hf.cli import main
from bd3lm_hf.tokenization import MASK


@pytest.fixture
def tokenizer():
    """A tokenizer of 63 words without a mask token; id 0 is both BOS and EOS."""
    words = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, 63)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def stock(tokenizer, rows=0, **fields):
    """Return a decoder with `rows` more rows than the tokenizer has tokens."""
    eos = tokenizer.eos_token_id
    sizes = {"vocab_size": len(tokenizer) + rows, "bos_token_id": eos, "eos_token_id": [eos, 1], "pad_token_id": None}
    return tiny_stock("qwen3", **sizes, **fields)


@pytest.mark.parametrize("rows", [0, 5])
def test_the_mask_token_is_a_free_row_if_there_is_one(tokenizer, rows):
    decoder = stock(tokenizer, rows)
    before = decoder.get_input_embeddings().weight.detach().clone()
    model = adapt_decoder(decoder, tokenizer=tokenizer)
    assert (model.config.mask_token_id, tokenizer.mask_token) == (63, MASK) and tokenizer.mask_token_id == 63
    assert model.config.vocab_size == (63 + rows if rows else 64)
    embedding = model.get_input_embeddings().weight
    assert embedding is model.get_output_embeddings().weight
    assert torch.equal(embedding[:63], before[:63])
    torch.testing.assert_close(embedding[63], before[:63].mean(0))


def test_a_reserved_token_comes_before_a_new_row(tokenizer):
    tokenizer.add_tokens(["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"], special_tokens=True)
    model = adapt_decoder(stock(tokenizer), tokenizer=tokenizer)
    assert tokenizer.mask_token == "<|reserved_special_token_0|>"
    assert (model.config.mask_token_id, model.config.vocab_size) == (63, 65)


def test_a_mask_token_that_exists_is_kept_unless_it_has_decayed(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    for scale in (1.0, 1e-4):
        decoder = stock(tokenizer)
        embedding = decoder.get_input_embeddings().weight
        with torch.no_grad():
            embedding[tokenizer.mask_token_id] *= scale
        row = embedding[tokenizer.mask_token_id].clone()
        model = adapt_decoder(decoder, tokenizer=tokenizer)
        assert model.config.mask_token_id == tokenizer.mask_token_id
        assert torch.equal(model.get_input_embeddings().weight[tokenizer.mask_token_id], row) == (scale == 1.0)


def test_a_name_keeps_dtype_rope_and_generation_config(tmp_path, tokenizer):
    decoder = stock(tokenizer, 3, rope_parameters={"rope_type": "default", "rope_theta": 5e5}).to(torch.bfloat16)
    decoder.generation_config.update(do_sample=True, temperature=0.7)
    decoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = adapt_decoder(tmp_path, block_size=8, model_length=32, alignment="shifted")
    assert (model.dtype, model.config.block_size, model.config.alignment) == (torch.bfloat16, 8, "shifted")
    assert model.config.rope_parameters["rope_theta"] == 5e5
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 1]
    assert model.generation_config.temperature == 0.7
    for spelling in ("dtype", "torch_dtype"):
        assert adapt_decoder(tmp_path, **{spelling: "float16"}).dtype == torch.float16


def test_the_configuration_is_read_from_the_subfolder_of_the_weights(tmp_path, tokenizer):
    decoder = stock(tokenizer, 3)
    decoder.save_pretrained(tmp_path / "part")
    model = adapt_decoder(tmp_path, subfolder="part", tokenizer=tokenizer)
    assert torch.equal(model.get_output_embeddings().weight[:60], decoder.get_output_embeddings().weight[:60])


def test_a_decoder_can_be_offloaded_to_the_disk(tmp_path, tokenizer):
    stock(tokenizer, 3).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers": "disk"}
    options = {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
    offloaded = adapt_decoder(tmp_path, **options)
    assert any(weight.is_meta for weight in offloaded.parameters())
    whole = adapt_decoder(tmp_path)
    ids = random_ids()
    assert torch.equal(offloaded.token_nll(ids, estimator="exact").nll, whole.token_nll(ids, estimator="exact").nll)


def test_default_tokens_outside_a_small_vocabulary_are_dropped():
    model = adapt_decoder(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)))
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.vocab_size) == (None, None, 65)
    assert model.generate(random_ids(), max_new_tokens=4).shape == (2, 16)
    with pytest.raises(ValueError, match="eos_token_id=100 is outside"):
        adapt_decoder(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=100)))


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])  # tied, untied, and a table called `wte`
def test_the_row_of_the_mask_token_trains_with_adapters(family, tokenizer, tmp_path):
    fields = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    adapt_decoder(tiny_stock(family, **fields), tokenizer=tokenizer).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before, mask = model.get_input_embeddings().weight.detach().clone(), model.config.mask_token_id
    adapted = add_adapters(model, rank=2, train_mask_row=True).train()
    ids = random_ids()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.token_nll(ids, estimator="exact").nll
        loaded = load_model(str(tmp_path / "adapter"))
        torch.testing.assert_close(loaded.token_nll(ids, estimator="exact").nll, expected, atol=1e-4, rtol=1e-4)
    changed = (loaded.get_input_embeddings().weight != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [mask]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_token_id": 1}, "mask_token_id=1"),
        ({"mask_token_id": 5000}, "mask_token_id=5000"),
        ({"block_size": 128}, "block_size=128"),
        ({"colour": "red"}, "colour"),
        ({"dtype": torch.float16}, "dtype"),
        ({"attention_dropout": 0.5}, "attention_dropout"),
        ({"var_min": True}, "var_min"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_fields_that_do_not_fit_are_refused(tokenizer, fields, message):
    with pytest.raises(ValueError, match=message):
        adapt_decoder(stock(tokenizer), tokenizer=tokenizer, **fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(num_hidden_layers=1), "mamba.*recurrent.*llama"),
        (BloomConfig(n_layer=1), "bloom.*ALiBi"),
        (T5Config(), "t5.*encoder-decoder"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        adapt_decoder(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["eval", "--dataset", "python-docs"], 2),  # it has no bound to score
        (["infill", "--text", "w3 ___ w4"], 2),
        (["generate", "--prompt", "w5", "--max-new-tokens", "2"], 0),  # autoregressively
        (["generate", "--chat", "--max-new-tokens", "2"], 0),
    ],
)
def test_a_plain_decoder_gets_advice_on_how_to_adapt_it(tmp_path, monkeypatch, capsys, caplog, words, code):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("bd3lm_hf"), "propagate", True)
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\n"))
    assert main([*words, "--model", str(save_stock("qwen3", tmp_path))]) == code
    told = capsys.readouterr().err + caplog.text
    assert f"--init_from {tmp_path}" in told and "Qwen3ForCausalLM" in told


def test_an_invalid_attention_implementation_is_not_reported_as_a_damaged_checkpoint(tokenizer, tmp_path):
    adapt_decoder(stock(tokenizer), tokenizer=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="flash_attention_2.*sdpa") as caught:
        load_model(str(tmp_path), attn_implementation="flash_attention_2")
    assert str(tmp_path) in str(caught.value) and "cannot be loaded" not in str(caught.value)
