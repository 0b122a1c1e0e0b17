"""`bd3lm train --init_from DECODER`: conversations, adapters and their base, new decoders by the fields of ours."""

import json
import shutil

import pytest
import torch
from decoders import END, save_stock
from safetensors.torch import load_file
from transformers import MambaConfig

from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.cli import main as bd3lm
from bd3lm_hf.training.arguments import ModelArguments
from bd3lm_hf.training.command_line import parse_arguments
from bd3lm_hf.training.initial_model import check_start, make_model, new_config
from bd3lm_hf.training.inputs import load_documents, make_sequences, make_tokenizer
from bd3lm_hf.user_files import BASE_NAME


# peft calls a deprecated function of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_stock("qwen3", tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    turns = [("user", "w10 w11"), ("assistant", "w12 w13 w14"), ("user", "w15"), ("assistant", "w16")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 20)
    return path


def words_of(decoder, conversations, folder, *more):
    fields = {"model_length": 32, "max_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 0}
    fields |= {"save_steps": 1, "max_eval_samples": 2, "global_batch_size": 2, "logging_steps": 1, "sample_tokens": 4}
    given = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    places = ["--init_from", str(decoder), "--dataset", str(conversations), "--output_dir", str(folder)]
    return ["train", "adapt", *places, *given, "--bf16", "false", "--gradient_checkpointing", "false", *more]


@pytest.mark.parametrize("fill", [None, False])
def test_the_block_that_ends_a_turn_is_filled_for_decoders(fill, decoder, conversations, tmp_path):
    more = [] if fill is None else ["--fill_turns", str(fill)]
    arguments = parse_arguments(words_of(decoder, conversations, tmp_path, *more)[1:])
    documents = load_documents(arguments.data)
    tokenizer = make_tokenizer(arguments, documents)
    config = make_model(arguments.model, tokenizer).config
    row = make_sequences(arguments, documents, tokenizer, config).train[0]
    ids, labels = row["input_ids"], row["labels"]
    text = [1, 10, 11, 2, 12, 13, 14, END]
    filling = [] if fill is False else [END] * (-len(text) % 4)
    text += [*filling, 1, 15, 2, 16, END]
    assert ids == text + [END] * (-len(text) % 4)
    turns = [*range(4, 8 + len(filling)), *range(len(text) - 2, len(ids))]
    assert [position for position, label in enumerate(labels) if label != -100] == turns


@pytest.mark.parametrize("mask_token_id", [None, 12])
def test_the_mask_token_of_a_run_is_a_new_row_of_mean_weights(mask_token_id, decoder, conversations, tmp_path):
    more = [] if mask_token_id is None else ["--mask_token_id", str(mask_token_id)]
    arguments = parse_arguments(words_of(decoder, conversations, tmp_path, *more)[1:])
    tokenizer = make_tokenizer(arguments, load_documents(arguments.data))
    model = make_model(arguments.model, tokenizer)
    mask = mask_token_id or 60  # 60: the first free row
    assert tokenizer.mask_token_id == model.config.mask_token_id == mask
    table = model.get_input_embeddings().weight.detach()
    before = load_file(decoder / "model.safetensors")["model.embed_tokens.weight"]
    others = [number for number in range(60) if number != mask]
    assert torch.equal(table[others], before[others])
    torch.testing.assert_close(table[mask], before[others].mean(0), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("flags", "message"), [(["--mask_token_id", "0"], "mask_token_id=0.*eos"), (["--mask_token_id", "64"], "64")]
)
def test_an_impossible_mask_token_is_refused(flags, message, decoder, conversations, tmp_path):
    arguments = parse_arguments(words_of(decoder, conversations, tmp_path, *flags)[1:])
    with pytest.raises(ValueError, match=message):
        make_tokenizer(arguments, load_documents(arguments.data))
    with pytest.raises(ValueError, match="--mask_token_id.*--init_from"):
        check_start(ModelArguments(mask_token_id=int(flags[1])))


def test_a_family_that_is_not_supported_is_refused_before_text_is_read(tmp_path):
    MambaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--init_from .*mamba.*recurrent.*llama"):
        check_start(ModelArguments(init_from=str(tmp_path)))


def test_adapters_on_a_plain_decoder_have_the_base_of_the_run(decoder, conversations, tmp_path, capsys, no_load_check):
    words = words_of(decoder, conversations, tmp_path / "run", "--lora_r", "2", "--learning_rate", "0.1")
    assert bd3lm(words) == 0
    run = tmp_path / "run"
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(run / BASE_NAME)
    stock, base = load_file(decoder / "model.safetensors"), load_file(run / BASE_NAME / "model.safetensors")
    assert stock.keys() == base.keys()
    assert torch.equal(stock["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    trained = load_file(run / "adapter_model.safetensors")
    assert [name for name in trained if "lora_" not in name] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    model = load_model(str(run))
    assert model.config.model_type == "bd3lm_qwen3" and type(model).__name__ == "BD3LMQwen3ForMaskedLM"
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, base["model.layers.0.mlp.up_proj.weight"])
    # A longer run continues, and a folder that has moved is still whole.
    saved = (run / BASE_NAME / "model.safetensors").stat().st_mtime_ns
    assert bd3lm([*words, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert (run / BASE_NAME / "model.safetensors").stat().st_mtime_ns == saved
    shutil.move(run, tmp_path / "moved")
    assert load_model(str(tmp_path / "moved")).config.block_size == 4
    assert load_model(str(tmp_path / "moved" / "checkpoint-3")).config.block_size == 4
    capsys.readouterr()
    assert bd3lm(["push", str(tmp_path / "moved"), "me/model", "--dry-run", str(tmp_path / "tree")]) == 2
    assert "push that first" in capsys.readouterr().err
    assert bd3lm(["push", str(tmp_path / "moved" / BASE_NAME), "me/base", "--dry-run", str(tmp_path / "base")]) == 0


@pytest.mark.parametrize("model_type", ["bd3lm_llama", "bd3lm_qwen3", "bd3lm_gpt2"])
def test_a_new_decoder_has_the_shape_of_our_fields(model_type):
    shape = {"hidden_dim": 32, "n_blocks": 1, "n_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = new_config(model_type, vocab_size=64, block_size=4, model_length=16, **special, **shape)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 1, 4)
    assert getattr(config, "intermediate_size", 128) == 128 and getattr(config, "num_key_value_heads", 4) == 4
    recipe = parse_arguments(["--model_type", model_type, "--use_cpu"]).model.config_fields()
    assert {"hidden_dim": 128, "n_blocks": 3, "n_heads": 4}.items() <= recipe.items() and "cond_dim" not in recipe
    assert ModelArguments().config_fields() == {}
