"""Fields are inferred from weights and configuration; SSD-LM's two parts become one; pickles are read as data."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared_models import Attack
from test_cli import assert_refused
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForMaskedLM

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, SSDLMForMaskedLM
from bd3lm_hf.hub_upload.convert import convert
from bd3lm_hf.hub_upload.layouts import InertObject, architecture_of, plain, read_checkpoint


@pytest.fixture
def state(tiny_config) -> dict[str, torch.Tensor]:
    return BD3LMForMaskedLM(tiny_config).state_dict()


def test_what_a_configuration_lacks_is_inferred_from_the_weights_and_noted(state):
    found = architecture_of(state, {"model_type": "mdlm"})
    expected = {"vocab_size": 48, "hidden_dim": 32, "n_blocks": 2, "n_heads": 2, "cond_dim": 16, "model_length": 1024}
    assert expected.items() <= found.fields.items()
    assert "n_heads=2" in str(found.notes) and "model_length=1024" in str(found.notes)
    found = architecture_of(state, {"model_type": "mdlm", "cond_dim": 129, "n_heads": 2})
    assert found.fields["cond_dim"] == 16  # as in the weights
    assert any("cond_dim=16" in note and "129" in note for note in found.notes)


@pytest.mark.parametrize(
    ("config", "block_size"),
    [
        ({"architectures": ["BD3LM"]}, 1),
        ({}, 1),
        ({"architectures": ["BD3LMForMaskedLM"]}, BD3LMConfig(vocab_size=8).block_size),
        ({"block_size": 16}, 16),
    ],
)
def test_a_block_size_that_is_not_given_is_the_default_of_the_class(state, config, block_size):
    assert architecture_of(state, {"model_type": "bd3lm", **config}).fields["block_size"] == block_size


@pytest.mark.parametrize(("config", "model_type"), [({}, "ar"), ({"causal": False}, "bd3lm")])
def test_without_adaln_a_model_is_autoregressive_unless_its_configuration_says_otherwise(state, config, model_type):
    plain = {name: tensor for name, tensor in state.items() if "sigma_map" not in name and "adaLN" not in name}
    assert architecture_of(plain, {"model_type": "bd3lm", **config}).model_type == model_type


@pytest.mark.parametrize("config", [{"model": {}}, {"model": 3, "noise": "x"}, {"training": [1]}])
def test_sizes_that_cannot_be_inferred_are_named_and_other_types_ignored(state, config):
    with pytest.raises(ValueError, match="block_size"):
        architecture_of(state, {**config, "algo": {"name": "bd3lm"}})
    del state["backbone.rotary_emb.inv_freq"]
    with pytest.raises(ValueError, match="n_heads"):
        architecture_of(state, {"model_type": "bd3lm"})


def test_the_vocabulary_of_bert_has_its_mask_inside():
    state = {"backbone.vocab_embed.embedding": torch.zeros(30522, 4), "backbone.blocks.0.norm1.weight": torch.ones(4)}
    found = architecture_of(state, {"causal": True, "n_heads": 2})
    assert found.fields["mask_token_id"] == 103
    assert any("bert-base-uncased" in note for note in found.notes)


# SSD-LM


@pytest.fixture
def layers() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    timestep = {"weight": draw(16, 1), "bias": draw(16)}
    return {"embed_sum_layer.pt": {"weight": draw(16, 320)}, "timestep_layer.pt": timestep}


@pytest.fixture
def source(tiny_tokenizer, layers, tmp_path) -> Path:
    """As the original saves it: an encoder, its tokenizer, and the two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    special = {f"{name}_token_id": getattr(tiny_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = RobertaConfig(vocab_size=320, max_position_embeddings=60, type_vocab_size=1, **sizes, **special)
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "source")
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    for file, tensors in layers.items():
        torch.save(tensors, tmp_path / "source" / file)
    return tmp_path / "source"


def expected_logits(source: Path, layers, inputs) -> torch.Tensor:
    """The network by hand: context words, then the mixture of words and the progress."""
    encoder = RobertaForMaskedLM.from_pretrained(source).eval()
    words = encoder.get_input_embeddings()(inputs["input_ids"])
    mixed = inputs["noisy_logits"].softmax(-1) @ layers["embed_sum_layer.pt"]["weight"].T
    step = layers["timestep_layer.pt"]
    progress = inputs["timesteps"].view(-1, 1, 1) @ step["weight"].T + step["bias"]
    logits = encoder(inputs_embeds=torch.cat([words, mixed + progress], dim=1)).logits
    return logits[:, words.shape[1] :]


@torch.no_grad()
def test_the_original_layout_becomes_a_folder_that_loads_by_itself(source, layers, tiny_tokenizer, tmp_path):
    done = convert(str(source), tmp_path / "ours")
    assert done.model_type == "ssdlm"
    assert any("block_size=25 and model_length=57" in note for note in done.notes)  # 60 positions, 3 of them unused
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(model) is SSDLMForMaskedLM
    inputs = model.dummy_inputs
    torch.testing.assert_close(model(**inputs).logits, expected_logits(source, layers, inputs), atol=1e-5, rtol=0)
    config = model.config
    assert (config.mask_token_id, config.eos_token_id) == (tiny_tokenizer.mask_token_id, tiny_tokenizer.eos_token_id)
    assert (tmp_path / "ours" / "modeling_ssdlm.py").is_file() and (tmp_path / "ours" / "tokenizer.json").is_file()
    prompt = tiny_tokenizer("A block", return_tensors="pt").input_ids
    text = model.generate(prompt, max_new_tokens=3, num_denoising_steps=2)
    assert text.shape[1] - prompt.shape[1] in (1, 2, 3)


def test_names_of_old_versions_and_of_wrappers_are_understood(source, layers, tmp_path):
    """transformers 4.20 saved a pickle, tied tensors under both names, and the position numbers."""
    encoder = RobertaForMaskedLM.from_pretrained(source).state_dict()
    assert "lm_head.decoder.weight" in encoder
    old = {name: tensor.clone() for name, tensor in encoder.items()}
    torch.save(old | {"roberta.embeddings.position_ids": torch.arange(60)[None]}, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    for file, tensors in layers.items():
        torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, source / file)
    done = convert(str(source), tmp_path / "ours")
    assert any("roberta.embeddings.position_ids is not a weight" in note for note in done.notes)
    ours = SSDLMForMaskedLM.from_pretrained(tmp_path / "ours").state_dict()
    assert torch.equal(ours["timestep.bias"], layers["timestep_layer.pt"]["bias"])
    assert all(torch.equal(ours[f"model.{name}"], tensor) for name, tensor in encoder.items())


def changed(source: Path, change) -> None:
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def test_missing_unexpected_misshapen_and_untied_weights_are_errors(source, layers, tmp_path):
    target = tmp_path / "ours"
    changed(source, lambda weights: weights.pop("lm_head.dense.weight"))
    with pytest.raises(ValueError, match=r"Missing .*model.lm_head.dense.weight"):
        convert(str(source), target)
    changed(source, lambda weights: weights.update({"lm_head.dense.weight": torch.zeros(16, 16), "x": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"Unexpected .*\"model.x\""):
        convert(str(source), target)
    changed(source, lambda weights: weights.pop("x"))
    torch.save({"weight": torch.zeros(8, 320)}, source / "embed_sum_layer.pt")
    with pytest.raises(ValueError, match=r"size mismatch for embed_sum.weight"):
        convert(str(source), target)
    changed(source, lambda weights: weights.update({"lm_head.decoder.weight": torch.zeros(320, 16)}))
    with pytest.raises(ValueError, match="word_embeddings.weight and model.lm_head.decoder.weight"):
        convert(str(source), target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("timestep_layer.pt", {"weight": torch.zeros(16, 1)}, "timestep_layer.pt .*weight, bias"),
        ("embed_sum_layer.pt", {"weight": 3}, "embed_sum_layer.pt .*weight"),
        ("embed_sum_layer.pt", None, "embed_sum_layer.pt.*SSD-LM"),
    ],
)
def test_layers_with_other_contents_are_refused(source, tmp_path, file, content, message):
    (source / file).unlink()
    if content is not None:
        torch.save(content, source / file)
    with pytest.raises(ValueError, match=message):
        convert(str(source), tmp_path / "ours")


def test_another_model_type_contradicts_the_layout(source, tmp_path):
    with pytest.raises(ValueError, match="--model-type mdlm: .*ssdlm"):
        convert(str(source), tmp_path / "ours", model_type="mdlm")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(ValueError, match="model_type='t5'.*not a masked language model"):
        convert(str(source), tmp_path / "ours")


def test_a_vocabulary_that_was_enlarged_is_that_of_the_weights(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    done = convert(str(source), tmp_path / "ours")
    assert any("vocab_size=320" in note and "300" in note for note in done.notes)


# Pickles


@pytest.mark.parametrize("file", ["pytorch_model.bin", "evil.ckpt"])
def test_code_in_a_checkpoint_is_named_and_not_run(bd3lm, tmp_path, file):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"model_type": "bd3lm"}')
    torch.save({"state_dict": {}, "hyper_parameters": Attack(tmp_path / "was-run")}, tmp_path / "source" / file)
    source = tmp_path / "source" / (file if file.endswith(".ckpt") else "")
    assert_refused(bd3lm("convert", source, tmp_path / "target"), "system")
    # The model's own loader refuses it too, without torch's long advice.
    code, _, err = bd3lm("generate", "--model", tmp_path / "source", "--prompt", "A")
    assert code == 2 and err.count("\n") == 1 and len(err) < 600 and str(tmp_path / "source") in err
    assert not (tmp_path / "was-run").exists() and not (tmp_path / "target").exists()


def archive_of(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a checkpoint whose pickle is `program`."""
    torch.save({}, path.with_suffix(".tmp"))
    with zipfile.ZipFile(path.with_suffix(".tmp")) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.namelist():
            new.writestr(entry, program if entry.endswith("data.pkl") else old.read(entry))
    return path


@pytest.mark.parametrize(
    ("program", "part"),
    [
        (b"cbuiltins\neval\n.", "builtins.eval"),
        (b"cos\nopen\n.", "os.open"),
        (b"\x80\x02}q\x00.", "state_dict"),
        (b"\x80\x02]q\x00h\x00a.", "list"),
        *((program, "cannot be read") for program in (b"", b"(", b"P1\n.")),
    ],
)
def test_other_programs_and_files_are_refused(bd3lm, tmp_path, program, part):
    archive_of(tmp_path / "archive.ckpt", program)
    (tmp_path / "file.ckpt").write_bytes(program)
    assert_refused(bd3lm("convert", tmp_path / "archive.ckpt", tmp_path / "target"), "archive.ckpt", part)
    assert_refused(bd3lm("convert", tmp_path / "file.ckpt", tmp_path / "target"), "file.ckpt", "cannot be read")


def test_programs_of_torchscript_and_archives_that_expand_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.ckpt")
    bomb = b"\x80\x02X" + (10**8).to_bytes(4, "little") + b"a" * 10**8 + b"."
    archive_of(tmp_path / "bomb.ckpt", bomb, zipfile.ZIP_DEFLATED)
    for name, part in (("script.ckpt", "torchscript"), ("bomb.ckpt", "expands to 100,0")):
        with pytest.raises(ValueError, match=part):
            read_checkpoint(tmp_path / name)


def test_records_become_plain_values_unless_they_are_cyclic_or_explode():
    node, record = InertObject(), InertObject()
    node.state, record.state = {"_val": 1}, {"_content": {"a": node, "b": [1, "x"]}, "_parent": None}
    assert plain({"config": record}) == {"config": {"a": 1, "b": [1, "x"]}}
    cyclic: list = []
    cyclic.append(cyclic)
    laughs: list = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    for hostile in (cyclic, laughs):
        with pytest.raises(ValueError, match="hyper-parameters"):
            plain(hostile)
