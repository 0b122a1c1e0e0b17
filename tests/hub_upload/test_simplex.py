"""The original layout of SSD-LM becomes one folder: a masked language model with two layers in files beside it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForMaskedLM

from bd3lm_hf import SSDLMForMaskedLM
from bd3lm_hf.hub_upload.convert import convert
from bd3lm_hf.hub_upload.layouts import is_simplex_layout


@pytest.fixture
def layers() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {
        "embed_sum_layer.pt": {"weight": draw(16, 320)},
        "timestep_layer.pt": {"weight": draw(16, 1), "bias": draw(16)},
    }


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
    assert is_simplex_layout(source) and not is_simplex_layout(tmp_path)
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
    assert any("roberta.embeddings.position_ids is no weight" in note for note in done.notes)
    ours = SSDLMForMaskedLM.from_pretrained(tmp_path / "ours").state_dict()
    assert torch.equal(ours["timestep.bias"], layers["timestep_layer.pt"]["bias"])
    assert all(torch.equal(ours[f"model.{name}"], tensor) for name, tensor in encoder.items())


def changed(source: Path, change) -> None:
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def test_missing_unexpected_and_misshapen_weights_are_errors(source, layers, tmp_path):
    target = tmp_path / "ours"
    changed(source, lambda weights: weights.pop("lm_head.dense.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(model.lm_head.dense.weight\)"):
        convert(str(source), target)
    changed(source, lambda weights: weights.update({"lm_head.dense.weight": torch.zeros(16, 16), "x": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"1 unexpected \(model.x\)"):
        convert(str(source), target)
    changed(source, lambda weights: weights.pop("x"))
    torch.save({"weight": torch.zeros(8, 320)}, source / "embed_sum_layer.pt")
    with pytest.raises(ValueError, match=r"1 of another shape \(embed_sum.weight\)"):
        convert(str(source), target)
    assert not target.exists()


def test_tied_weights_that_differ_are_an_error(source, tmp_path):
    changed(source, lambda weights: weights.update({"lm_head.decoder.weight": torch.zeros(320, 16)}))
    with pytest.raises(ValueError, match="word_embeddings.weight and model.lm_head.decoder.weight differ"):
        convert(str(source), tmp_path / "ours")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "timestep_layer.pt",
            {"weight": torch.zeros(16, 1)},
            "timestep_layer.pt holds weight instead of weight, bias",
        ),
        ("embed_sum_layer.pt", {"weight": 3}, "embed_sum_layer.pt holds weight instead of weight"),
        ("embed_sum_layer.pt", None, "holds no embed_sum_layer.pt, which belongs to the layout of SSD-LM"),
    ],
)
def test_layers_that_hold_something_else_are_refused(source, tmp_path, file, content, message):
    (source / file).unlink()
    if content is not None:
        torch.save(content, source / file)
    with pytest.raises(ValueError, match=message):
        convert(str(source), tmp_path / "ours")


def test_code_in_a_layer_is_named_and_not_run(source, tmp_path):
    torch.save({"weight": Attack(tmp_path / "touched")}, source / "embed_sum_layer.pt")
    with pytest.raises(ValueError, match="asks for .*open"):
        convert(str(source), tmp_path / "ours")
    assert not (tmp_path / "touched").exists()


def test_a_folder_that_is_no_masked_language_model_is_refused(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    with pytest.raises(ValueError, match="model_type='nothing' of config.json is no masked language model"):
        convert(str(source), tmp_path / "ours")


def test_another_model_type_contradicts_the_layout(source, tmp_path):
    with pytest.raises(ValueError, match="--model-type mdlm: the files of .* are those of a ssdlm"):
        convert(str(source), tmp_path / "ours", model_type="mdlm")


def test_a_vocabulary_that_was_enlarged_is_that_of_the_weights(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    done = convert(str(source), tmp_path / "ours")
    assert "vocab_size=320 as in the weights; the configuration says 300" in done.notes
