"""The comparison: every model by the same code, complete runs kept, one table."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bd3lm_hf.cli import main as bd3lm
from bd3lm_hf.training.compare import ComparedModel, comparison_table, generate_samples, read_plan


FIELDS = {"vocab_size": 300, "model_length": 16, "hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8}
FIELDS |= {"dropout": 0.0, "max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0, "logging_steps": 1}
FIELDS |= {"eval_strategy": "no", "max_eval_samples": 4, "save_strategy": "no", "sample_tokens": 0}
FIELDS |= {"disable_tqdm": True}
MODELS = {
    "ar": {"model_type": "ar"},
    "bd3lm-4": {"model_type": "bd3lm", "block_size": 4},
    "mdlm": {"model_type": "mdlm"},
    "sedd": {"model_type": "sedd"},
    "ssdlm": {"model_type": "ssdlm", "block_size": 4, "cond_dim": None, "num_denoising_steps": 3},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    rows = [{"text": f"Sentence {i} says that every masked token is revealed once. " * 3} for i in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"models": MODELS, "seeds": [3], "num_texts": 3, "text_length": 12, **FIELDS}
    (folder / "compare.yaml").write_text(yaml.safe_dump({**content, "dataset": str(folder / "text.jsonl")}))
    return folder / "compare.yaml"


def test_models_are_trained_once_and_compared_in_one_table(recipe, tmp_path, capsys):
    words = ["compare", str(recipe), "--output_dir", str(tmp_path / "runs")]
    assert bd3lm(words) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [row["model"] for row in rows] == list(MODELS)
    assert [row["exact"] for row in rows] == [True, False, False, False, False]
    assert {row["training_tokens"] for row in rows} == {2 * 4 * 16}
    for row in rows:
        # After two steps every model is close to the uniform distribution over 300 ids.
        assert 100 < row["generative_perplexity"] < 1000 and row["seconds_per_token"] > 0
        assert 0 < row["entropy"] <= torch.tensor(12.0).log() + 1e-6
    for row in rows[:4]:
        assert 100 < row["perplexity"] < 1000 and 0 < row["forwards_per_token"] <= row["batch_forwards_per_token"]
        assert f"| {row['model']} | {'' if row['exact'] else '<= '}{row['perplexity']:.1f} |" in printed
    # It has no likelihood, and takes three steps for each of the three blocks that cover eleven tokens.
    assert rows[4]["perplexity"] is None and rows[4]["forwards_per_token"] == pytest.approx(9 / 11)
    assert "| ssdlm | none |" in printed and "`none` a model without a likelihood" in printed
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/model.safetensors")}
    assert len(trained) == 5
    assert bd3lm([*words, "--models", "ar", "mdlm"]) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert bd3lm([*words, "--max_steps", "3"]) == 2
    assert "holds a run with another max_steps" in capsys.readouterr().err


def test_a_checkpoint_of_another_vocabulary_judges_and_a_missing_one_is_refused(recipe, tmp_path, capsys, gpt2_folder):
    words = ["compare", str(recipe), "--models", "ar", "--output_dir", str(tmp_path / "runs"), "--judge"]
    assert bd3lm([*words, str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    assert bd3lm([*words, str(gpt2_folder)]) == 0
    (row,) = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert 100 < row["generative_perplexity"] < 1000


def test_a_model_starts_from_the_weights_of_another_one(recipe, tmp_path, capsys):
    content = {**yaml.safe_load(recipe.read_text()), "logging_steps": 10}
    decoder = {"model_type": "bd3lm_llama", "block_size": 1, "alignment": "shifted", "context": "token"}
    adapted = {"init_from": "ar", "block_size": 4, "alignment": "same", "context": "block", "max_steps": 1}
    content["models"] = {"ar": decoder, "adapted": {**adapted, "learning_rate": 0.0}}
    del content["cond_dim"], content["dropout"]  # of our own network
    (tmp_path / "adapt.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert bd3lm(["compare", str(tmp_path / "adapt.yaml"), "--output_dir", str(tmp_path / "runs")]) == 0
    ar, adapted = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert (ar["exact"], adapted["exact"]) == (True, False)
    assert ar["training_tokens_per_second"] is None  # a run too short to log its speed
    assert "| unknown |" in capsys.readouterr().out
    assert (ar["training_tokens"], adapted["training_tokens"]) == (2 * 4 * 16, 3 * 4 * 16)
    folders = (tmp_path / "runs" / f"{name}-seed3" for name in ("ar", "adapted"))
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="adapted starts from ar"):
        read_plan([str(tmp_path / "adapt.yaml"), "--models", "adapted"])


def test_the_shipped_recipe_names_the_papers_models():
    plan = read_plan([])
    assert list(plan.models) == ["ar", "bd3lm-4", "bd3lm-8", "bd3lm-16", "mdlm", "sedd", "ssdlm"]
    assert plan.judge == "ar" and len(plan.seeds) > 1
    steps = {name: fields["max_steps"] for name, fields in read_plan(["adaptation"]).models.items()}
    assert steps["ar"] + steps["adapted-4"] == steps["scratch-4"] == steps["scratch-16-shifted"]


def test_the_command_line_overrides_the_recipe(recipe):
    words = ["--models", "mdlm", "--seeds", "1", "2", "--max_steps=7", "--output_dir", "there"]
    plan = read_plan([str(recipe), *words, "--interval_candidates", "0.3-0.8", "0.4-0.9"])
    assert list(plan.models) == ["mdlm"] and plan.seeds == [1, 2]
    assert plan.common["max_steps"] == 7 and str(plan.folder) == "there"
    assert plan.common["interval_candidates"] == ["0.3-0.8", "0.4-0.9"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "'nowhere.yaml'"),
        (["--models", "gpt"], "--models gpt: the recipe"),
        (["--num_texts", "0"], "--num_texts: expected an integer >= 1, got '0'"),
        (["--text_length", "1"], "--text_length: expected an integer >= 2, got '1'"),
        (["--max_stepps", "3"], "--max_stepps 3: did you mean --max_steps"),
        (["--max_steps"], "--max_steps: expected at least one argument"),
        (["--max_steps", "x"], "max_steps"),
        (["--seeds", "1", "x"], "--seeds: invalid int value: 'x'"),
        (["--output_dir", "here", "there"], "there"),
        (["--judge", "ssdlm"], "--judge ssdlm has no likelihood to score texts by"),
    ],
)
def test_bad_input_is_refused_before_any_training_and_leaves_nothing(recipe, tmp_path, capsys, words, message):
    words = [*words, "--output_dir", str(tmp_path / "runs")] if "--output_dir" not in words else words
    assert bd3lm(["compare", *([] if words[0] == "nowhere.yaml" else [str(recipe)]), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["comparison.json", "ssdlm-seed3.yaml"])
def test_a_foreign_file_is_not_replaced(recipe, tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert bd3lm(["compare", str(recipe), "--models", "ar", "ssdlm", "--output_dir", str(tmp_path)]) == 2
    assert name in capsys.readouterr().err and (tmp_path / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["max_steps: 3", "- ar", "models:", "models: {ar: }", "models: {}"])
def test_a_recipe_without_models_is_refused(tmp_path, text):
    (tmp_path / "plain.yaml").write_text(text)
    with pytest.raises(ValueError, match="names no models"):
        read_plan([str(tmp_path / "plain.yaml")])


def test_means_and_ranges_are_printed_and_bounds_are_marked():
    def row(model: str, seed: int, perplexity: float | None, exact: bool) -> ComparedModel:
        about = {"dataset": "a book (validation split)", "estimator": "exact bound"}
        return ComparedModel(model, seed, perplexity, exact, 1000, 10.0, 50.0, 2.0, 1.0, 1.0, 0.001, **about)

    rows = [row("a", 1, 10.0, True), row("a", 2, 12.0, True), row("b", 1, 20.0, False), row("c", 1, None, False)]
    text = comparison_table(rows)
    assert "| a | 11.0 (10.0 - 12.0) | 50.0 | 2.00 | 1.00 |" in text
    assert "| b | <= 20.0 |" in text and "| c | none | 50.0 |" in text
    assert "Held-out text: a book (validation split), exact bound." in text


def test_texts_have_one_length_even_where_they_could_end(tiny_model):
    with torch.no_grad():
        tiny_model.get_output_embeddings().bias[1] = 5.0  # the end of a text is likely
    written = generate_samples(tiny_model, 3, 12, seed=0)
    assert [len(text.ids) for text in written] == [12] * 3 and any(1 in text.new_ids for text in written)
    assert [text.ids for text in written] == [text.ids for text in generate_samples(tiny_model, 3, 12, seed=0)]
    assert [text.forwards for text in written] == [11] * 3
