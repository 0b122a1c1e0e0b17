"""The model card describes a model from the files of its run, in metadata for the Hub, with snippets that run."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from shared_models import SCORE, add_run, make_adapter

from bd3lm_hf import ARConfig, ARForCausalLM
from bd3lm_hf.hub_upload.card import make_card
from bd3lm_hf.hub_upload.repo_files import read_contents


@pytest.fixture
def card(model_folder):
    """A function `(folder=the run, **options) -> card`, read again from its text."""
    add_run(model_folder)

    def make(folder=model_folder, **options):
        contents = read_contents(folder, tokenizer=options.get("tokenizer", True))
        return ModelCard(str(make_card(contents.model, folder, "me/my-model", **options)))

    return make


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)


def run_snippet(snippet, folder):
    """Return what a snippet prints when it loads `folder`."""
    printed = []
    exec(snippet.replace("me/my-model", str(folder)), {"print": lambda *values: printed.extend(values)})
    return printed


def table_of(card):
    """Return the rows of all tables, by their first cell."""
    lines = [line for line in card.text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)}


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_metadata_name_task_data_license_and_results(card):
    made = card(license="apache-2.0", language="en", tags=["mine"])
    data = made.data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert data.pipeline_tag == "text-generation" and data.datasets == ["Salesforce/wikitext"]
    assert {"bd3lm", "mine"} < set(data.tags)
    # The results come back from the model index.
    found = {result.metric_type: result for result in data.eval_results}
    assert data.model_name == "my-model"
    values = {name: result.metric_value for name, result in found.items()}
    assert values == {name: SCORE[name] for name in ("perplexity", "nll", "bits_per_byte")}
    result = found["perplexity"]
    assert (result.dataset_name, result.dataset_type) == ("wikitext103", "Salesforce/wikitext")
    assert (result.task_type, result.dataset_split) == ("text-generation", "validation")
    assert result.metric_args == {"estimator": "exact"}
    block = yaml.safe_load(str(made).split("---")[1])
    assert block["license"] == "apache-2.0" and block["model-index"][0]["name"] == "my-model"


def test_the_tables_describe_model_training_and_scores(card, model_folder):
    contents = read_contents(model_folder)
    contents.model.set_interval(0.3, 0.8)
    made = make_card(contents.model, model_folder, "me/my-model")
    table = table_of(made)
    assert table["block size"] == ["4"]
    assert table["parameters"] == [f"{sum(p.numel() for p in contents.model.parameters()):,}"]
    assert table["interval of noise levels in training"] == ["0.3 to 0.8"]
    assert table["weights"] == ["exponential moving average, decay 0.99"]
    assert table["learning rate"] == ["0.001"] and table["optimizer steps"] == ["7"] and table["seed"] == ["3"]
    assert table["after training"] == ["12.18", "2.5000 ± 0.0100", "1.2500"]
    assert table["unigram model"][0] == "99.50"
    # A score names its data and its estimator.
    assert "1,234 tokens in 40 sequences of the held-out split of wikitext103, with the estimator `exact`" in made.text
    assert "secret-place" not in str(made)


def test_learned_intervals_and_raw_and_averaged_weights_are_named(card, model_folder):
    add_run(model_folder, interval_search=True)
    change_json(model_folder / "weights.json", weights="raw")
    table = table_of(card())
    assert table["interval of noise levels"][0].startswith("learned")
    assert table["weights"] == ["last step of training, not averaged"]
    assert table_of(card(decay=0.9))["weights"] == ["exponential moving average, decay 0.9"]


def test_without_a_tokenizer_the_snippets_take_token_ids(card, model_folder):
    found = snippets(card(tokenizer=False))
    assert len(found) == 3 and "okenizer" not in "".join(found)
    config, (ids,), (nats,) = (run_snippet(snippet, model_folder) for snippet in found)
    assert config == ["bd3lm", 320] and ids.shape == (1, 20) and 0 < nats < 40


def test_the_card_of_an_adapter_names_its_base(card, model_folder, tmp_path):
    folder = make_adapter(model_folder, tmp_path / "adapter")
    made = card(folder, base="me/base")
    assert (made.data.library_name, made.data.base_model) == ("peft", "me/base")
    assert "[me/base](https://huggingface.co/me/base)" in made.text
    count = sum(p.numel() for name, p in read_contents(folder).model.named_parameters() if "lora_" in name)
    assert table_of(made)["parameters of the adapter"] == [f"{count:,}"]
    (text,), (texts,), (nats,) = (run_snippet(snippet, folder) for snippet in snippets(made))
    assert text.startswith("The") and len(text) > len("The")
    assert texts[0].startswith("The") and texts[1].startswith("Once upon a time")
    assert 0 < nats < 40  # hardly trained, one draw of noise without a seed


def test_only_a_bound_is_called_a_bound(tmp_path, card):
    config = ARConfig(vocab_size=48, model_length=16, hidden_dim=32, n_blocks=1, n_heads=2)
    text = make_card(ARForCausalLM(config), tmp_path, "me/ar", tokenizer=False).text
    assert "upper bound" not in text and "token_nll" in text
    assert "upper bound" in card().text


def test_a_model_without_a_likelihood_claims_none_and_shows_its_loss(card, model_folder, monkeypatch):
    loss = {"loss": 3.5, "standard_error": 0.25, "num_tokens": 10, "num_sequences": 2, "seconds": 1.0}
    change_json(model_folder / "results.json", after=loss, unigram_perplexity=None)
    model = read_contents(model_folder).model
    monkeypatch.setattr(type(model), "has_likelihood", False, raising=False)
    made = make_card(model, model_folder, "me/my-model")
    assert "token_nll(" not in snippets(made)[2] and "upper bound" not in made.text
    once, again = (run_snippet(snippets(made)[2], model_folder) for _ in range(2))
    assert once == again and once[0][0].startswith("The quick brown fox")
    assert table_of(made)["after training"] == ["", "3.5000 ± 0.2500", ""]
    assert [(r.metric_type, r.metric_value) for r in made.data.eval_results] == [("loss", 3.5)]


def test_a_local_file_is_named_without_its_folder(card, model_folder):
    add_run(model_folder, dataset="/home/me/secret/corpus.txt", init_from="/home/me/secret/model")
    made = card()
    assert "secret" not in str(made) and "/home" not in str(made)
    assert made.data.datasets is None and made.data.eval_results[0].dataset_type == "corpus.txt"


def test_what_is_not_recorded_is_not_claimed(model_folder):
    model = read_contents(model_folder).model
    made = ModelCard(str(make_card(model, model_folder, "me/my-model")))
    assert "## Training" not in made.text and "## Evaluation" not in made.text
    assert "Not recorded in the folder" in made.text
    assert made.data.eval_results is None and "model_name" not in str(made)
    (model_folder / "recipe.yaml").write_text("{}\n")
    assert "`python-docs`" in make_card(model, model_folder, "me/my-model").text


def test_a_checkpoint_has_the_recipe_of_its_run_but_not_its_results(model_folder):
    add_run(model_folder.parent)
    made = make_card(read_contents(model_folder).model, model_folder, "me/my-model")
    assert table_of(made)["learning rate"] == ["0.001"]
    assert "## Evaluation" not in made.text and made.data.eval_results is None


@pytest.mark.parametrize(
    "after", [{**SCORE, "perplexity": float("inf"), "bits_per_byte": None}, {"nll": 2.5}], ids=["infinite", "missing"]
)
def test_only_finite_numbers_are_results(card, model_folder, after):
    (model_folder / "results.json").write_text(json.dumps({"after": after}))
    assert [result.metric_type for result in card().data.eval_results] == ["nll"]


@pytest.mark.parametrize(("name", "text"), [("recipe.yaml", "{"), ("results.json", "{")])
def test_a_damaged_file_of_a_run_is_named(card, model_folder, name, text):
    (model_folder / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        card()


@pytest.mark.parametrize("field", ["optim", "init_from", "dataset", "final_estimator"])
def test_values_of_a_run_cannot_add_markup_or_break_a_table(card, model_folder, field):
    add_run(model_folder, **{field: "a | b\n\n<script>alert(1)</script> [x](http://evil)\x1b[2K"})
    text = card().text
    assert "<script>" not in text and "[x](http" not in text and "\x1b" not in text
    for line in text.splitlines():
        if "alert" in line and line.startswith("|"):
            assert line.endswith("|") and re.sub(r"\\.", "", line).count("|") == 3
