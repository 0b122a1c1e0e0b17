"""A decoder that became a block-diffusion model is converted, pushed, verified and loaded by others."""

import re

import pytest
import torch
from decoders import save_stock
from hub_server import USER
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from bd3lm_hf.hub_upload.convert import convert
from bd3lm_hf.hub_upload.load_check import check_loads_alone
from bd3lm_hf.hub_upload.repo_files import files_of
from bd3lm_hf.tokenization import load_tokenizer


REPO = f"{USER}/decoder"


@pytest.fixture
def stock(tmp_path):
    return save_stock("qwen3", tmp_path / "stock")


@pytest.fixture
def blocks(stock, bd3lm, tmp_path):
    """The block-diffusion model that a stock decoder became."""
    code, _, err = bd3lm("convert", stock, tmp_path / "blocks", "--block-size", "4")
    assert (code, err) == (0, "")
    return tmp_path / "blocks"


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_decoder_that_stays_autoregressive_converts_back(family, bd3lm, tmp_path):
    stock, blocks = save_stock(family, tmp_path / "stock"), tmp_path / "blocks"
    convert(str(stock), blocks, block_size=4, context="token", alignment="shifted")
    assert bd3lm("convert", blocks, tmp_path / "back", "--to", "stock")[0] == 0
    config = AutoConfig.from_pretrained(tmp_path / "back")
    assert config.model_type == AutoConfig.from_pretrained(stock).model_type
    weights, there, back = (load_file(folder / "model.safetensors") for folder in (stock, blocks, tmp_path / "back"))
    assert weights.keys() == there.keys() == back.keys()
    mask = load_tokenizer(str(blocks)).mask_token_id
    for name, tensor in weights.items():
        # The mask's row is new.
        used = torch.arange(len(tensor)) != mask if re.search(r"embed_tokens|wte|lm_head", name) else slice(None)
        assert torch.equal(there[name][used], tensor[used]) and torch.equal(back[name], there[name]), name


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
