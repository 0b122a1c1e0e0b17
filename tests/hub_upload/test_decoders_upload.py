"""A decoder that became a block-diffusion model is converted, pushed, verified and loaded by others."""

import re

import pytest
import torch
from decoders import random_ids, save_stock
from hub_server import USER
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

from bd3lm_hf.hub_upload.convert import convert
from bd3lm_hf.hub_upload.load_check import check_loads_alone
from bd3lm_hf.hub_upload.repo_files import files_of
from bd3lm_hf.tokenization import load_tokenizer


REPO = f"{USER}/decoder"


@pytest.fixture
def blocks(bd3lm, tmp_path):
    """The block-diffusion model that a stock decoder became."""
    code, _, err = bd3lm("convert", save_stock("qwen3", tmp_path / "stock"), tmp_path / "blocks", "--block-size", "4")
    assert (code, err) == (0, "")
    return tmp_path / "blocks"


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])  # tied, untied, and with other names
def test_a_decoder_that_stays_autoregressive_converts_back(family, bd3lm, tmp_path):
    fields = {} if family == "gpt2" else {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    stock, blocks = save_stock(family, tmp_path / "stock", **fields), tmp_path / "blocks"
    convert(str(stock), blocks, block_size=4, context="token", alignment="shifted")
    assert bd3lm("convert", blocks, tmp_path / "back", "--to", "stock")[0] == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (stock, tmp_path / "back"))
    assert type(after) is type(before)
    weights, there, back = (load_file(folder / "model.safetensors") for folder in (stock, blocks, tmp_path / "back"))
    assert weights.keys() == there.keys() == back.keys()
    mask = load_tokenizer(str(blocks)).mask_token_id
    for name, tensor in weights.items():
        # The mask's row is new.
        used = torch.arange(len(tensor)) != mask if re.search(r"embed_tokens|wte|lm_head", name) else slice(None)
        assert torch.equal(there[name][used], tensor[used]) and torch.equal(back[name], there[name]), name
    used, ids = torch.arange(before.config.vocab_size) != mask, random_ids().clamp(max=mask - 1)
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits[..., used], before(ids).logits[..., used], atol=1e-5, rtol=1e-5)


def test_a_pushed_decoder_is_verified_and_loads_without_this_package(blocks, hub, bd3lm, tmp_path):
    code, out, err = bd3lm("push", blocks, REPO, "--license", "mit")
    assert (code, err) == (0, "") and "/commit/" in out
    files = hub.repos[REPO].files()
    assert {"modeling_bd3lm_decoders.py", "model.safetensors", "README.md", "manifest.json"} < files.keys()
    for name, content in files.items():
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    assert bd3lm("verify", tmp_path / "there", "--strict")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(blocks).eval()
    check_loads_alone(tmp_path / "there", model)
    code, out, _ = bd3lm("push", blocks, REPO, "--license", "mit")
    assert code == 0 and "nothing to do" in out
    assert files_of(blocks).keys() < files.keys() | {"README.md"}


def test_a_converted_decoder_holds_a_conversation_in_the_pipeline(blocks):
    generator = pipeline("text-generation", model=str(blocks), tokenizer=load_tokenizer(str(blocks)))
    messages = [{"role": "user", "content": "w10 w11"}]
    answer = generator(messages, max_new_tokens=6)[0]["generated_text"]
    assert answer[0] == messages[0] and answer[1]["role"] == "assistant"
