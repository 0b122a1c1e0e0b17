"""The tree holds exactly what a model needs; what can not be shared is refused by a look at the folder."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sharing import JUNK, add_run, make_adapter

from bd3lm_hf import ARConfig, ARForCausalLM
from bd3lm_hf.checkpoints import NotFiniteError
from bd3lm_hf.hub_upload.repo_files import (
    CODE,
    check_source,
    files_of,
    kind_of,
    left_out,
    name_base,
    read_contents,
    write_contents,
)
from bd3lm_hf.run_folder import mark_complete


@pytest.fixture
def tree(tmp_path):
    """A function `(folder, **options of read_contents) -> (folder of its tree, contents)`."""

    def write(folder, max_shard_size="5GB", **options):
        contents = read_contents(folder, **options)
        write_contents(contents, folder, tmp_path / "tree", max_shard_size=max_shard_size)
        return tmp_path / "tree", contents

    return write


@pytest.fixture
def adapter_folder(model_folder, tmp_path):
    return make_adapter(model_folder, tmp_path / "adapter")


def test_the_tree_of_a_run_holds_the_model_and_none_of_the_rest(model_folder, tree):
    written, _ = tree(add_run(model_folder))
    names = set(files_of(written))
    code = {path.name for path in model_folder.glob("*.py")} - set(JUNK)
    others = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == code | others
    for name in code:
        assert (written / name).read_bytes() == (CODE / name).read_bytes()
    junk = {f"{name.split('/')[0]}/" if "/" in name else name for name in JUNK}
    assert set(left_out(model_folder, written)) == junk | {"recipe.yaml", "results.json", "weights.json"}


def test_nothing_in_the_tree_names_the_folder_or_a_token(model_folder, tree):
    written, _ = tree(add_run(model_folder))
    for path in files_of(written).values():
        content = path.read_bytes()
        assert str(model_folder).encode() not in content and b"hf_secret" not in content, path.name


def test_the_same_model_gives_the_same_bytes(model_folder, tree, tmp_path):
    written, _ = tree(model_folder)
    first = {name: path.read_bytes() for name, path in files_of(written).items()}
    shutil.rmtree(written)
    again, _ = tree(model_folder)
    assert {name: path.read_bytes() for name, path in files_of(again).items()} == first


def test_large_weights_are_split_and_load_again(model_folder, tree):
    written, contents = tree(model_folder, max_shard_size="20KB")
    shards = sorted(path.name for path in written.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1 and (written / "model.safetensors.index.json").is_file()
    tensors = {name: t for shard in shards for name, t in load_file(written / shard).items()}
    state = contents.model.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_an_autoregressive_model_brings_its_own_code(tmp_path, tiny_tokenizer, randomize, tree):
    config = ARConfig(vocab_size=len(tiny_tokenizer), model_length=32, hidden_dim=32, n_blocks=1, n_heads=2)
    randomize(ARForCausalLM(config)).save_pretrained(tmp_path / "ar")
    written, _ = tree(tmp_path / "ar", tokenizer=False)
    assert {path.name for path in written.glob("modeling_*.py")} == {"modeling_ar.py", "modeling_bd3lm.py"}
    assert not (written / "tokenizer.json").is_file()


@pytest.mark.parametrize(("weights", "shift"), [("auto", 1.0), ("ema", 1.0), ("raw", 0.0)])
def test_of_a_checkpoint_the_average_is_taken_unless_raw_weights_are_asked_for(model_folder, tree, weights, shift):
    raw = load_file(model_folder / "model.safetensors")
    average = {name: t + 1.0 for name, t in raw.items() if "sampling_eps" not in name and "inv_freq" not in name}
    save_file(average, model_folder / "ema.safetensors", metadata={"decay": "0.9"})
    written, contents = tree(model_folder, weights=weights)
    saved = load_file(written / "model.safetensors")
    name = "backbone.vocab_embed.embedding"
    torch.testing.assert_close(saved[name], raw[name] + shift)
    assert torch.equal(saved["sampling_eps_min"], raw["sampling_eps_min"])
    assert contents.decay == (0.9 if shift else None)
    assert "ema.safetensors" in contents.notes[0] and not (written / "ema.safetensors").exists()


def test_an_average_that_is_not_there_or_of_another_model_is_refused(model_folder):
    with pytest.raises(ValueError, match=r"--weights ema: .* holds no ema.safetensors"):
        read_contents(model_folder, weights="ema")
    save_file({"other": torch.zeros(2)}, model_folder / "ema.safetensors")
    with pytest.raises(ValueError, match=r"an average of other \(2,\), which is no weight of this model"):
        read_contents(model_folder)


def test_an_adapter_is_shared_as_an_adapter_that_names_its_base(adapter_folder, model_folder, tree):
    written, contents = tree(adapter_folder)
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files_of(written)) == names
    assert isinstance(contents.model, PeftModel) and contents.base == str(model_folder)
    name_base(written, "me/base")
    assert json.loads((written / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"


def test_an_adapter_on_a_folder_asks_for_the_name_of_its_base(adapter_folder, model_folder):
    with pytest.raises(ValueError, match=r"is an adapter on .*, which is a folder here and nowhere else: push that"):
        check_source(adapter_folder)
    check_source(adapter_folder, base_model="me/base")
    with pytest.raises(ValueError, match="--base-model .* is a folder here"):
        check_source(adapter_folder, base_model=str(model_folder))


def test_a_whole_model_has_no_base(model_folder):
    with pytest.raises(ValueError, match="--base-model me/base: .* is no adapter"):
        check_source(model_folder, base_model="me/base")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        check_source(tmp_path / "nowhere")


def test_a_folder_without_a_model_is_refused_and_its_checkpoint_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.json and no adapter_config.json: name the folder of a run"):
        check_source(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    mark_complete(tmp_path / "checkpoint-3", {"resumable": True})
    with pytest.raises(ValueError, match=r"its last checkpoint is .*checkpoint-3"):
        check_source(tmp_path)


def test_a_checkpoint_that_is_not_complete_is_refused(model_folder):
    mark_complete(model_folder, {"resumable": True})
    (model_folder / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"not complete: generation_config.json is missing"):
        check_source(model_folder)


def test_pickled_weights_are_refused(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\).*bd3lm convert"):
        check_source(model_folder)
    (model_folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"holds no weights: none of model.safetensors"):
        check_source(model_folder)


def test_a_missing_tokenizer_is_refused_unless_there_is_none(model_folder):
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no tokenizer: .* or pass --no-tokenizer"):
        check_source(model_folder)
    check_source(model_folder, tokenizer=False)
    assert read_contents(model_folder, tokenizer=False).tokenizer is None


def test_weights_that_are_not_finite_are_refused(model_folder):
    weights = load_file(model_folder / "model.safetensors")
    weights["backbone.vocab_embed.embedding"][0, 0] = float("nan")
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"vocab_embed.embedding in .* are NaN or infinite"):
        read_contents(model_folder)


def test_the_tokenizer_of_another_model_is_refused(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "mask_token_id": 9}))
    with pytest.raises(ValueError, match="mask_token_id is 9"):
        read_contents(model_folder)


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "training_args.bin", ".env", "rng_state.pth", "ema.safetensors", "run.json", "conftest.py"]
    + ["sub/modeling_bd3lm.py", "__init__.py", "recipe.yaml", "events.out", "pytorch_model.bin", "sub/config.json"],
)
def test_a_file_of_another_kind_is_never_allowed(name):
    assert kind_of(name) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-00001-of-00002.safetensors", "weights"),
        ("modeling_bd3lm.py", "code"),
        ("config.json", "configuration"),
        ("chat_template.jinja", "tokenizer"),
        ("README.md", "model card"),
        ("manifest.json", "manifest"),
    ],
)
def test_every_allowed_file_has_a_kind(name, kind):
    assert kind_of(name) == kind
