"""Conversion of checkpoints in every layout that was published, made here from the documented names."""

import json
import os
import pickle
import shutil
import sys
import types
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from bd3lm_hf import (
    ARConfig,
    ARForCausalLM,
    BD3LMConfig,
    BD3LMForMaskedLM,
    MDLMConfig,
    MDLMForMaskedLM,
    SEDDConfig,
    SEDDForMaskedLM,
)
from bd3lm_hf.cli import main as bd3lm
from bd3lm_hf.hub_upload.convert import convert, to_published
from bd3lm_hf.hub_upload.layouts import architecture_of
from bd3lm_hf.hub_upload.safe_pickle import plain, read_checkpoint


SIZES = {"vocab_size": 48, "model_length": 32, "hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2}
CLASSES = {
    "bd3lm": (BD3LMForMaskedLM, BD3LMConfig),
    "ar": (ARForCausalLM, ARConfig),
    "mdlm": (MDLMForMaskedLM, MDLMConfig),
    "sedd": (SEDDForMaskedLM, SEDDConfig),
}
# What the repositories' configurations say (each leaves out other things).
PUBLISHED = {
    "bd3lm": {
        "architectures": ["BD3LM"],
        "model_type": "bd3lm",
        "auto_map": {"AutoConfig": "configuration.BD3LMConfig", "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM"},
        "block_size": 4,
        "cross_attn": True,
        "adaln": True,
        "causal": False,
        "attn_backend": "flex",
        "var_min": True,
        "sampling_eps_min": 0.001,
        "sampling_eps_max": 0.999,
        "time_conditioning": False,
        "return_dict": False,
        "dropout": 0.1,
        **SIZES,
    },
    "ar": {"model_type": "bd3lm", "causal": True, "adaln": False, "cross_attn": False, "block_size": 1, **SIZES},
    "mdlm": {"model_type": "mdlm", "time_conditioning": False, "dropout": 0.1, "return_dict": False, **SIZES},
    "sedd": {"model_type": "mdlm", "time_conditioning": True, "dropout": 0.1, **SIZES},
}


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


def assert_same(folder, model) -> None:
    """The folder holds the model."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)


def logits_of(model) -> torch.Tensor:
    ids = torch.randint(0, 47, (2, 16), generator=torch.Generator().manual_seed(0))
    sigma = {"timesteps": torch.tensor([0.2, 1.5])} if model.config.time_conditioning else {}
    with torch.no_grad():
        return model(ids, **sigma).logits


@pytest.mark.parametrize("weights_file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", list(CLASSES))
def test_a_published_folder_becomes_one_that_loads_by_itself(make_model, tmp_path, kind, weights_file):
    model = make_model(kind)
    source = write_folder(tmp_path / "source", kind, model.state_dict(), weights_file)
    done = convert(str(source), tmp_path / "target")
    assert done.model_type == kind
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert type(loaded) is CLASSES[kind][0]
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)
    if kind == "bd3lm":
        assert loaded.interval() == pytest.approx((0.3, 0.8))
    assert not (tmp_path / ".incomplete").exists()


def test_shards_are_put_together(make_model, tmp_path):
    model = make_model("mdlm")
    state = model.state_dict()
    names = sorted(state)
    source = write_folder(tmp_path / "source", "mdlm", {n: state[n] for n in names[::2]}, "a.safetensors")
    save_file({n: state[n] for n in names[1::2]}, source / "b.safetensors")
    weight_map = {n: "ab"[i % 2] + ".safetensors" for i, n in enumerate(names)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(str(source), tmp_path / "target")
    assert_same(tmp_path / "target", model)


def test_a_pretraining_checkpoint_without_a_clean_stream_stays_block_diffusion(make_model, tmp_path):
    model = make_model("bd3lm", block_size=32, cross_attn=False)
    source = write_folder(tmp_path / "source", "bd3lm", model.state_dict())
    config = {**PUBLISHED["bd3lm"], "block_size": 32, "cross_attn": False}
    (source / "config.json").write_text(json.dumps(config))
    assert convert(str(source), tmp_path / "target").model_type == "bd3lm"
    assert_same(tmp_path / "target", model)


@pytest.mark.parametrize("kind", ["bd3lm", "mdlm"])
def test_published_folders_that_say_what_they_are_load_as_they_are(make_model, tmp_path, kind):
    model = make_model(kind)
    source = write_folder(tmp_path / "source", kind, model.state_dict())
    loaded, info = AutoModelForMaskedLM.from_pretrained(source, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)


# --- Lightning -------------------------------------------------------------------------------------------------------


@pytest.fixture
def omegaconf(monkeypatch):
    """Classes of the names and the pickled form of OmegaConf's, which is not installed."""
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
        "algo": {"name": kind, "cross_attn": kind == "bd3lm", "time_conditioning": kind == "sedd", "ignore_bos": True},
        "model": {"hidden_size": 32, "length": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2, "dropout": 0.1},
        "block_size": 4 if kind == "bd3lm" else "${model.length}",
        "noise": {"type": "loglinear"},
        "training": {"resample": True, "ema": 0.9999},
    }


def write_lightning(path, model, average, config, compiled=False):
    prefix = "backbone._orig_mod." if compiled else "backbone."
    state = {name.replace("backbone.", prefix): tensor for name, tensor in model.state_dict().items()}
    contents = {
        "epoch": 3,
        "global_step": 1000,
        "state_dict": state,
        "hyper_parameters": {"config": config},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 3e-4}]}],
    }
    if average is not None:
        shadows = [parameter.detach().clone() for parameter in average.backbone.parameters()]
        contents["ema"] = {"decay": 0.9999, "num_updates": 10, "shadow_params": shadows}
    torch.save(contents, path)
    return path


def test_a_folder_that_does_not_load_as_it_was_is_not_published(make_model, tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source", "mdlm", make_model("mdlm").state_dict())
    other = make_model("mdlm")
    with torch.no_grad():
        other.get_output_embeddings().bias[0] += 1
    monkeypatch.setattr("bd3lm_hf.hub_upload.convert.load_model", lambda *args, **kwargs: other)
    with pytest.raises(ValueError, match="what was saved does not load as the model that was converted"):
        convert(str(source), tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", list(CLASSES))
def test_a_lightning_checkpoint_gives_its_average_or_its_raw_weights(
    make_model, randomize, omegaconf, tmp_path, kind, compiled
):
    model, average = make_model(kind), randomize(make_model(kind), seed=1)
    source = write_lightning(tmp_path / "last.ckpt", model, average, omegaconf(lightning_config(kind)), compiled)
    for weights, expected in (("auto", average), ("raw", model)):
        done = convert(str(source), tmp_path / weights, weights=weights)
        assert done.model_type == kind
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / weights)
        torch.testing.assert_close(logits_of(loaded), logits_of(expected), atol=1e-5, rtol=0)
        assert loaded.config.resample is (kind != "ar")


def test_a_checkpoint_without_an_average_gives_its_weights(make_model, tmp_path):
    model = make_model("ar")
    source = write_lightning(tmp_path / "last.ckpt", model, None, lightning_config("ar"))
    convert(str(source), tmp_path / "target")
    assert_same(tmp_path / "target", model)
    with pytest.raises(ValueError, match="--weights ema: this checkpoint holds no moving average"):
        convert(str(source), tmp_path / "other", weights="ema")


def test_an_average_of_another_model_is_refused(make_model, tmp_path):
    model = make_model("mdlm")
    fewer = make_model("mdlm", n_blocks=1)
    source = write_lightning(tmp_path / "last.ckpt", model, fewer, lightning_config("mdlm"))
    with pytest.raises(ValueError, match=r"the moving average holds \d+ tensors for \d+ parameters"):
        convert(str(source), tmp_path / "target")
    wider = make_model("mdlm", vocab_size=64)
    source = write_lightning(tmp_path / "last.ckpt", model, wider, lightning_config("mdlm"))
    with pytest.raises(ValueError, match=r"vocab_embed.embedding has the shape \(64, 32\) instead of \(48, 32\)"):
        convert(str(source), tmp_path / "target")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_checkpoint_is_named_and_not_run(make_model, tmp_path):
    marker = tmp_path / "was-run"
    model = make_model("ar")
    contents = {"state_dict": model.state_dict(), "hyper_parameters": {"config": Attack(marker)}}
    torch.save(contents, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system, which is no tensor"):
        convert(str(tmp_path / "evil.ckpt"), tmp_path / "target")
    assert not marker.exists() and not (tmp_path / "target").exists()
    source = write_folder(tmp_path / "folder", "ar", contents, "pytorch_model.bin")
    with pytest.raises(ValueError, match="It was not run"):
        convert(str(source), tmp_path / "target")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "torch.load", "functools.partial"])
def test_functions_that_could_run_something_are_refused(tmp_path, name):
    module, _, function = name.rpartition(".")
    program = f"c{module}\n{function}\n.".encode()
    path = tmp_path / "file.ckpt"
    torch.save({}, path)
    rewritten = tmp_path / "rewritten.ckpt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(rewritten, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, program if entry.endswith("data.pkl") else old.read(entry))
    with pytest.raises(ValueError, match=f"asks for {name}"):
        read_checkpoint(rewritten)


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.ckpt")
    with pytest.raises(ValueError, match="is a TorchScript program"):
        read_checkpoint(tmp_path / "script.ckpt")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    for name in ("text.ckpt", "old.ckpt"):
        with pytest.raises(ValueError, match="is no checkpoint that torch.save wrote"):
            read_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list, no checkpoint"):
        read_checkpoint(tmp_path / "list.ckpt")
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="holds no state_dict but model"):
        convert(str(tmp_path / "other.ckpt"), tmp_path / "target")


def test_a_record_becomes_plain_values(omegaconf, tmp_path):
    torch.save({"state_dict": {}, "config": omegaconf({"a": {"b": 1, "c": [1, "x"]}})}, tmp_path / "file.ckpt")
    assert plain(read_checkpoint(tmp_path / "file.ckpt")["config"]) == {"a": {"b": 1, "c": [1, "x"]}}


# --- What does not fit -----------------------------------------------------------------------------------------------


def test_missing_and_unexpected_weights_are_listed(make_model, tmp_path):
    state = make_model("mdlm").state_dict()
    del state["backbone.blocks.1.norm2.weight"]
    state["backbone.extra"] = torch.zeros(2)
    source = write_folder(tmp_path / "source", "mdlm", state)
    message = r"1 missing \(backbone.blocks.1.norm2.weight\); 1 unexpected \(backbone.extra\)"
    with pytest.raises(ValueError, match=message):
        convert(str(source), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_weights_that_are_not_finite_are_refused(make_model, tmp_path):
    model = make_model("mdlm")
    with torch.no_grad():
        model.get_output_embeddings().bias[3] = torch.inf
    source = write_folder(tmp_path / "source", "mdlm", model.state_dict())
    with pytest.raises(ValueError, match="linear.bias in .* are NaN or infinite"):
        convert(str(source), tmp_path / "target")


def test_a_model_type_that_contradicts_the_weights_is_refused(make_model, tmp_path):
    source = write_folder(tmp_path / "source", "mdlm", make_model("mdlm").state_dict())
    with pytest.raises(ValueError, match="model_type='ar' contradicts the weights, which have adaLN"):
        convert(str(source), tmp_path / "target", model_type="ar")
    with pytest.raises(ValueError, match="model_type='gpt' is none of this family: choose one of bd3lm, ar"):
        convert(str(source), tmp_path / "target", model_type="gpt")


def test_weights_of_another_family_are_refused(tmp_path):
    source = write_folder(tmp_path / "source", "mdlm", {"transformer.wte.weight": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match="those of no model of this family: backbone.vocab_embed.embedding"):
        convert(str(source), tmp_path / "target")


def test_places_that_hold_no_checkpoint_are_named(tmp_path):
    with pytest.raises(ValueError, match="SRC ./nowhere: there is no such file or folder"):
        convert("./nowhere", tmp_path / "target")
    with pytest.raises(ValueError, match="holds no config.json"):
        convert(str(tmp_path), tmp_path / "target")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        convert(str(tmp_path), tmp_path / "target")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no weights: one of model.safetensors, pytorch_model.bin"):
        convert(str(tmp_path), tmp_path / "target")
    with pytest.raises(ValueError, match="can not be had from the hub"):
        convert("nobody/nothing", tmp_path / "target")


def test_a_target_in_use_is_left_alone(make_model, tmp_path):
    source = write_folder(tmp_path / "source", "mdlm", make_model("mdlm").state_dict())
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="is in use: name a folder that does not exist"):
        convert(str(source), target)
    assert (target / "precious.txt").read_text() == "mine"


def test_an_unknown_choice_of_weights_is_refused(make_model, tmp_path):
    source = write_folder(tmp_path / "source", "mdlm", make_model("mdlm").state_dict())
    with pytest.raises(ValueError, match="weights='best': choose 'ema', 'raw' or 'auto'"):
        convert(str(source), tmp_path / "target", weights="best")


# --- What is inferred ------------------------------------------------------------------------------------------------


def test_what_a_configuration_lacks_is_read_from_the_weights_and_said(make_model):
    state = make_model("mdlm").state_dict()
    found = architecture_of(state, {"model_type": "mdlm"})
    wanted = {"vocab_size": 48, "hidden_dim": 32, "n_blocks": 2, "n_heads": 2, "cond_dim": 16, "model_length": 1024}
    assert wanted.items() <= found.fields.items()
    assert any("n_heads=2, from the rotary frequencies" in note for note in found.notes)
    assert any("model_length=1024, that of the published" in note for note in found.notes)


def test_the_weights_are_believed_about_sizes(make_model):
    found = architecture_of(make_model("mdlm").state_dict(), {"model_type": "mdlm", "cond_dim": 129, "n_heads": 2})
    assert found.fields["cond_dim"] == 16
    assert "cond_dim=16 as in the weights; the configuration says 129" in found.notes


def test_sizes_that_nothing_tells_are_asked_for(make_model):
    state = make_model("bd3lm").state_dict()
    with pytest.raises(ValueError, match="block_size is not in the configuration"):
        architecture_of(state, {"model_type": "bd3lm"})
    del state["backbone.rotary_emb.inv_freq"]
    with pytest.raises(ValueError, match="n_heads is neither in the configuration nor to be seen"):
        architecture_of(state, {"model_type": "bd3lm"})


def test_the_vocabulary_of_bert_has_its_mask_inside():
    state = {"backbone.vocab_embed.embedding": torch.zeros(30522, 4), "backbone.blocks.0.norm1.weight": torch.ones(4)}
    found = architecture_of(state, {"causal": True, "n_heads": 2})
    assert found.fields["mask_token_id"] == 103
    assert any("bert-base-uncased" in note for note in found.notes)


# --- And back --------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="is a model of type 'ar': the published layout"):
        to_published(str(tmp_path / "ours"), tmp_path / "theirs")


def test_the_command_converts_and_says_what_it_did(make_model, tmp_path, capsys):
    source = write_folder(tmp_path / "source", "sedd", make_model("sedd").state_dict())
    assert bd3lm(["convert", str(source), str(tmp_path / "target")]) == 0
    printed = capsys.readouterr().out
    assert "note: taken for model_type='sedd'" in printed
    assert "logits checked after loading" in printed
    with pytest.raises(SystemExit) as stopped:
        bd3lm(["convert", str(source), str(tmp_path / "target")])
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: DST") and errors.count("\n") == 1
    shutil.rmtree(tmp_path / "target")
