"""Conversion of checkpoints in the published layouts, written here with the documented names."""

import json
import re
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared_models import CLASSES
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from bd3lm_hf.hub_upload.convert import convert, to_published


SIZES = {"vocab_size": 48, "model_length": 32, "hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2}
# The repositories' configurations (each omits different fields).
PUBLISHED = {
    "bd3lm": {
        **{"model_type": "bd3lm", "architectures": ["BD3LM"], "attn_backend": "flex", "return_dict": False},
        "auto_map": {"AutoConfig": "configuration.BD3LMConfig", "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM"},
        **{"block_size": 4, "cross_attn": True, "adaln": True, "causal": False, "time_conditioning": False},
        **{"var_min": True, "sampling_eps_min": 0.001, "sampling_eps_max": 0.999, "dropout": 0.1, **SIZES},
    },
    "ar": {"model_type": "bd3lm", "causal": True, "adaln": False, "cross_attn": False, "block_size": 1, **SIZES},
    "mdlm": {"model_type": "mdlm", "time_conditioning": False, "dropout": 0.1, "return_dict": False, **SIZES},
    "sedd": {"model_type": "mdlm", "time_conditioning": True, "dropout": 0.1, **SIZES},
    "sedd as bd3lm": {"model_type": "bd3lm", "time_conditioning": True, "cross_attn": False, "adaln": True, **SIZES},
    "bd3lm without block size": {"model_type": "bd3lm", "architectures": ["BD3LM"], "cross_attn": True, **SIZES},
}
# A pretraining checkpoint stays block diffusion.
PUBLISHED["bd3lm without clean stream"] = {**PUBLISHED["bd3lm"], "block_size": 32, "cross_attn": False}
OF_THE_MODEL = {"bd3lm without block size": {"block_size": 1}}
OF_THE_MODEL["bd3lm without clean stream"] = {"block_size": 32, "cross_attn": False}


@pytest.fixture
def make_model(randomize):
    def make(kind: str, **fields):
        model_class, config_class = CLASSES[kind]
        model = randomize(model_class(config_class(**{**SIZES, "dropout": 0.0, **fields}))).eval()
        if kind == "bd3lm":
            model.sampling_eps_min.fill_(0.3)
            model.sampling_eps_max.fill_(0.8)
        return model

    return make


def write_folder(folder, kind, state, weights_file="model.safetensors"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED[kind]))
    if weights_file.endswith(".bin"):
        torch.save(state, folder / weights_file)
    else:
        save_file(state, folder / weights_file)
    return folder


@pytest.fixture
def source(make_model, tmp_path):
    """A published folder of masked diffusion."""
    return write_folder(tmp_path / "source", "mdlm", make_model("mdlm").state_dict())


def assert_same(folder, model):
    """Check that a folder holds the model, and return what is loaded from it."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)
    return loaded


def logits_of(model) -> torch.Tensor:
    ids = torch.randint(0, 47, (2, 16), generator=torch.Generator().manual_seed(0))
    sigma = {"timesteps": torch.tensor([0.2, 1.5])} if model.config.time_conditioning else {}
    with torch.no_grad():
        return model(ids, **sigma).logits


@pytest.mark.parametrize("weights_file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("layout", list(PUBLISHED))
def test_a_published_folder_becomes_one_that_loads_by_itself(make_model, tmp_path, layout, weights_file):
    kind = layout.split()[0]
    model = make_model(kind, **OF_THE_MODEL.get(layout, {}))
    source = write_folder(tmp_path / "source", layout, model.state_dict(), weights_file)
    assert convert(str(source), tmp_path / "target").model_type == kind
    loaded = assert_same(tmp_path / "target", model)
    assert type(loaded) is CLASSES[kind][0]
    if kind == "bd3lm":
        interval = [loaded.config.sampling_eps_min, loaded.config.sampling_eps_max]
        assert [*interval, *loaded.interval()] == pytest.approx([0.3, 0.8] * 2)
        assert loaded.config.block_size == model.config.block_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_shards_are_put_together(make_model, tmp_path):
    model = make_model("mdlm")
    model.save_pretrained(tmp_path / "source", max_shard_size="30KB")
    assert (tmp_path / "source" / "model.safetensors.index.json").is_file()
    (tmp_path / "source" / "config.json").write_text(json.dumps(PUBLISHED["mdlm"]))
    convert(str(tmp_path / "source"), tmp_path / "target")
    assert_same(tmp_path / "target", model)


def test_a_published_folder_of_masked_diffusion_loads_as_it_is(make_model, tmp_path):
    model = make_model("mdlm")
    source = write_folder(tmp_path / "source", "mdlm", model.state_dict())
    loaded, info = AutoModelForMaskedLM.from_pretrained(source, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)


# Lightning


@pytest.fixture
def omegaconf(monkeypatch):
    """Classes with the names and the pickled form of OmegaConf's, which is not installed."""
    modules = {name: types.ModuleType(name) for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.nodes")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    class DictConfig:
        def __init__(self, content):
            self._content = {k: DictConfig(v) if isinstance(v, dict) else AnyNode(v) for k, v in content.items()}
            self._metadata, self._parent = None, None

        def __getstate__(self):
            return dict(vars(self))

        def __setstate__(self, state):
            raise AssertionError("the checkpoint's classes must not be used")

    class AnyNode:
        def __init__(self, value):
            self._val = value

        __setstate__ = DictConfig.__setstate__

    for cls, module in ((DictConfig, "omegaconf.dictconfig"), (AnyNode, "omegaconf.nodes")):
        cls.__module__, cls.__qualname__ = module, cls.__name__
        setattr(modules[module], cls.__name__, cls)
    return DictConfig


def lightning_config(kind: str) -> dict:
    return {
        "algo": {"name": kind, "cross_attn": kind == "bd3lm", "time_conditioning": False, "ignore_bos": True},
        "model": {"hidden_size": 32, "length": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2, "dropout": 0.1},
        "block_size": 4 if kind == "bd3lm" else "${model.length}",
        "noise": {"type": "loglinear"},
        "training": {"resample": True, "ema": 0.9999},
    }


def write_lightning(path, model, average, config, compiled=False):
    prefix = "backbone._orig_mod." if compiled else "backbone."
    state = {name.replace("backbone.", prefix): tensor for name, tensor in model.state_dict().items()}
    contents = {"epoch": 3, "global_step": 1000, "state_dict": state, "hyper_parameters": {"config": config}}
    contents["optimizer_states"] = [{"state": {}, "param_groups": [{"lr": 3e-4}]}]
    if average is not None:
        shadows = [parameter.detach().clone() for parameter in average.backbone.parameters()]
        contents["ema"] = {"decay": 0.9999, "num_updates": 10, "shadow_params": shadows}
    torch.save(contents, path)
    return path


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", list(CLASSES))
def test_a_lightning_checkpoint_gives_average_or_raw(make_model, randomize, omegaconf, tmp_path, kind, compiled):
    model, average = make_model(kind), randomize(make_model(kind), seed=1)
    source = write_lightning(tmp_path / "last.ckpt", model, average, omegaconf(lightning_config(kind)), compiled)
    for weights, expected in (("auto", average), ("raw", model)):
        assert convert(str(source), tmp_path / weights, weights=weights).model_type == kind
        assert assert_same(tmp_path / weights, expected).config.resample is (kind != "ar")


def test_a_checkpoint_without_an_average_gives_its_weights(make_model, tmp_path):
    model = make_model("ar")
    source = write_lightning(tmp_path / "last.ckpt", model, None, lightning_config("ar"))
    convert(str(source), tmp_path / "target")
    assert_same(tmp_path / "target", model)
    with pytest.raises(ValueError, match="--weights ema"):
        convert(str(source), tmp_path / "other", weights="ema")


def test_an_average_of_another_model_is_refused(make_model, tmp_path):
    for fields, message in (
        ({"n_blocks": 1}, r"\d+ tensors for \d+ parameters.*--weights raw"),
        ({"vocab_size": 64}, r"vocab_embed.embedding .*\(64, 32\) .*\(48, 32\)"),
    ):
        other, config = make_model("mdlm", **fields), lightning_config("mdlm")
        source = write_lightning(tmp_path / "last.ckpt", make_model("mdlm"), other, config)
        with pytest.raises(ValueError, match=message):
            convert(str(source), tmp_path / "target")


# What does not fit


def save(state, source):
    save_file(state, source / "model.safetensors")


def swap_a_weight(state, source):
    del state["backbone.blocks.1.norm2.weight"]
    save({**state, "backbone.extra": torch.zeros(2)}, source)


def write_infinity(state, source):
    state["backbone.output_layer.linear.bias"][3] = torch.inf
    save(state, source)


def write_index(content):
    def write(state, source):
        (source / "model.safetensors.index.json").write_text(content)

    return write


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (swap_a_weight, r"Missing .*backbone.blocks.1.norm2.weight.* Unexpected .*backbone.extra.*--model-type"),
        (write_infinity, "linear.bias .*NaN or infinite"),
        (lambda state, source: save({"transformer.wte.weight": torch.zeros(4, 4)}, source), "vocab_embed.embedding"),
        (lambda state, source: (source / "model.safetensors").write_bytes(b"\0" * 20), "model.safetensors is damaged"),
        (lambda state, source: (source / "model.safetensors").unlink(), "model.safetensors, pytorch_model.bin"),
        (lambda state, source: (source / "config.json").unlink(), "config.json"),
        (lambda state, source: (source / "config.json").write_text("{"), "config.json"),
        (lambda state, source: (source / "config.json").write_text("[1]"), "config.json"),
        (lambda state, source: (source / "config.json").write_text("[" * 100_000), "config.json"),
        *((write_index(text), "index.json") for text in ("{", "[]", "{}", '{"weight_map": [1]}', "[" * 100_000)),
        (write_index('{"weight_map": {"a": 3}}'), "index.json"),
        (write_index('{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors"),
        (write_index('{"weight_map": {"a": "/etc/x.safetensors"}}'), "/etc/x.safetensors"),
        (write_index('{"weight_map": {"a": "../x.safetensors"}}'), "../x.safetensors"),
    ],
)
def test_a_damaged_or_hostile_folder_is_refused_in_one_line(bd3lm, source, tmp_path, damage, part):
    damage(load_file(source / "model.safetensors"), source)
    code, _, err = bd3lm("convert", source, tmp_path / "target")
    assert code == 2 and re.search(part, err) and err.count("\n") == 1 and err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_link_out_of_the_folder_is_refused(source, tmp_path):
    (source / "model.safetensors").rename(tmp_path / "private.safetensors")
    (source / "model.safetensors").symlink_to(tmp_path / "private.safetensors")
    with pytest.raises(ValueError, match="model.safetensors"):
        convert(str(source), tmp_path / "target")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"model_type": "ar"}, "model_type='ar'"),
        ({"model_type": "gpt"}, "model_type='gpt'.*bd3lm, ar, mdlm, sedd"),
        ({"weights": "best"}, "weights='best'"),
        ({"weights": "ema"}, "--weights ema"),
    ],
)
def test_options_that_contradict_the_source_are_refused(source, tmp_path, options, part):
    with pytest.raises(ValueError, match=part):
        convert(str(source), tmp_path / "target", **options)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing"])
def test_a_source_that_does_not_exist_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        convert(name, tmp_path / "target")


def test_what_is_next_to_the_target_does_not_matter_and_a_target_in_use_stays(source, tmp_path):
    (tmp_path / ".incomplete" / "target.converted").mkdir(parents=True)
    (tmp_path / ".incomplete" / "target.converted" / "theirs").write_text("theirs")
    convert(str(source), tmp_path / "target")
    assert (tmp_path / ".incomplete" / "target.converted" / "theirs").read_text() == "theirs"
    (tmp_path / "target" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="DST .*target"):
        convert(str(source), tmp_path / "target")
    assert (tmp_path / "target" / "precious.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".incomplete", "source", "target"]


# Converting back


def test_a_model_of_ours_travels_to_the_published_layout_and_back(make_model, tiny_tokenizer, tmp_path):
    model = make_model("bd3lm", vocab_size=len(tiny_tokenizer), mask_token_id=tiny_tokenizer.mask_token_id)
    model.save_pretrained(tmp_path / "ours")
    tiny_tokenizer.save_pretrained(tmp_path / "ours")
    done = to_published(str(tmp_path / "ours"), tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["architectures"] == ["BD3LM"] and config["return_dict"] is False
    assert (config["sampling_eps_min"], config["sampling_eps_max"]) == pytest.approx((0.3, 0.8))
    assert set(load_file(tmp_path / "theirs" / "model.safetensors")) == set(model.state_dict())
    assert any("mask_token_id=3 has no field there" in note for note in done.notes)
    convert(str(tmp_path / "theirs"), tmp_path / "back")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "back")
    assert loaded.config.mask_token_id == tiny_tokenizer.mask_token_id
    for (name, mine), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


def test_only_block_diffusion_has_a_published_layout(make_model, tmp_path):
    make_model("ar").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="--to published: .*'ar'"):
        to_published(str(tmp_path / "ours"), tmp_path / "theirs")


def test_the_command_prints_what_it_did_and_which_tokenizer_is_missing(bd3lm, make_model, tmp_path):
    model = make_model("sedd", vocab_size=50258)
    source = write_folder(tmp_path / "source", "sedd", model.state_dict())
    code, out, err = bd3lm("convert", source, tmp_path / "target")
    assert (code, err.count("error")) == (0, 0)
    assert "model_type='sedd'" in out and "--tokenizer gpt2" in out and "logits checked after loading" in out
