"""The model card says what a run left about a model, in metadata that the hub reads, with snippets that run."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from sharing import SCORE, add_run, make_adapter

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


def said(snippet, folder):
    """What a snippet prints when it loads `folder`."""
    printed = []
    exec(snippet.replace("me/my-model", str(folder)), {"print": lambda *words: printed.extend(words)})
    return printed


def rows(card):
    """The cells of all tables, by their first."""
    lines = [line for line in card.text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)}


def test_the_metadata_name_the_task_the_data_and_the_license(card):
    data = card(license="apache-2.0", language="en", tags=["mine"]).data
    assert (data.license, data.language, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "en",
        "transformers",
        "text-generation",
    )
    assert data.datasets == ["Salesforce/wikitext"]
    assert {"bd3lm", "mine"} < set(data.tags)


def test_the_results_come_back_from_the_model_index(card):
    data = card().data
    assert data.model_name == "my-model"
    found = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {
        name: SCORE[name] for name in ("perplexity", "nll", "bits_per_byte")
    }
    result = found["perplexity"]
    assert (result.task_type, result.dataset_name, result.dataset_type, result.dataset_split) == (
        "text-generation",
        "wikitext103",
        "Salesforce/wikitext",
        "validation",
    )
    assert result.metric_args == {"estimator": "exact"}


def test_the_card_says_what_the_model_is_and_how_it_was_trained(card, model_folder):
    contents = read_contents(model_folder)
    contents.model.set_interval(0.3, 0.8)
    table = rows(make_card(contents.model, model_folder, "me/my-model"))
    assert table["block size"] == ["4"]
    assert table["parameters"] == [f"{sum(p.numel() for p in contents.model.parameters()):,}"]
    assert table["interval of noise levels in training"] == ["0.3 to 0.8"]
    assert table["weights"] == ["exponential moving average, decay 0.99"]
    assert table["learning rate"] == ["0.001"] and table["optimizer steps"] == ["7"] and table["seed"] == ["3"]
    assert table["after training"] == ["12.18", "2.5000 ± 0.0100", "1.2500"]
    assert table["word frequencies alone"][0] == "99.50"


def test_a_learned_interval_is_called_so(card, model_folder):
    add_run(model_folder, interval_search=True)
    assert rows(card())["interval of noise levels"][0].startswith("learned")


def test_raw_weights_are_called_so(card, model_folder):
    (model_folder / "weights.json").write_text(json.dumps({"weights": "raw", "step": 7}))
    assert rows(card())["weights"] == ["as they were trained, not averaged"]


def test_all_three_snippets_run_as_they_are_written(card, model_folder):
    written = snippets(card())
    assert len(written) == 3 and all("me/my-model" in snippet for snippet in written)
    (text,), (texts,), (nats,) = (said(snippet, model_folder) for snippet in written)
    assert text.startswith("The") and len(text) > len("The")
    assert texts[0].startswith("The") and texts[1].startswith("Once upon a time")
    assert 0 < nats < 20


def test_without_a_tokenizer_the_snippets_take_token_ids(card, model_folder):
    written = snippets(card(tokenizer=False))
    assert len(written) == 3 and "okenizer" not in "".join(written)
    config, (ids,), (nats,) = (said(snippet, model_folder) for snippet in written)
    assert config == ["bd3lm", 320] and ids.shape == (1, 20) and 0 < nats < 20


def test_the_card_of_an_adapter_names_its_base(card, model_folder, tmp_path):
    folder = make_adapter(model_folder, tmp_path / "adapter")
    made = card(folder, base="me/base")
    assert (made.data.library_name, made.data.base_model) == ("peft", "me/base")
    assert "[me/base](https://huggingface.co/me/base)" in made.text
    assert int(rows(made)["parameters of the adapter"][0].replace(",", "")) == sum(
        p.numel() for name, p in read_contents(folder).model.named_parameters() if "lora_" in name
    )
    (text,), (texts,), (nats,) = (said(snippet, folder) for snippet in snippets(made))
    assert text.startswith("The") and len(texts) == 2 and nats > 0


def test_the_average_of_a_checkpoint_is_called_so(card, model_folder):
    (model_folder / "weights.json").write_text(json.dumps({"weights": "raw", "step": 7}))
    assert rows(card(decay=0.9))["weights"] == ["exponential moving average, decay 0.9"]


def test_only_a_bound_is_called_a_bound(tmp_path, card):
    config = ARConfig(vocab_size=48, model_length=16, hidden_dim=32, n_blocks=1, n_heads=2)
    text = make_card(ARForCausalLM(config), tmp_path, "me/ar", tokenizer=False).text
    assert "upper bound" not in text and "token_nll" in text
    assert "upper bound" in card().text


def test_a_model_without_a_likelihood_claims_none(card, model_folder, monkeypatch):
    model = read_contents(model_folder).model
    monkeypatch.setattr(type(model), "has_likelihood", False, raising=False)
    made = make_card(model, model_folder, "me/my-model")
    assert "token_nll(" not in snippets(made)[2] and "upper bound" not in made.text
    once, again = (said(snippets(made)[2], model_folder) for _ in range(2))
    assert once == again and once[0][0].startswith("The quick brown fox")


def test_a_held_out_loss_stands_where_there_is_no_likelihood(card, model_folder):
    results = json.loads((model_folder / "results.json").read_text())
    loss = {"loss": 3.5, "standard_error": 0.25, "num_tokens": 10, "num_sequences": 2, "seconds": 1.0}
    (model_folder / "results.json").write_text(json.dumps({**results, "after": loss, "unigram_perplexity": None}))
    made = card()
    assert rows(made)["after training"] == ["", "3.5000 ± 0.2500", ""]
    assert [(r.metric_type, r.metric_value) for r in made.data.eval_results] == [("loss", 3.5)]


def test_a_file_of_the_trainer_is_named_without_its_folder(card, model_folder):
    add_run(model_folder, dataset="/home/me/secret/corpus.txt", init_from="/home/me/secret/model")
    made = card()
    assert "secret" not in str(made) and "/home" not in str(made)
    assert made.data.datasets is None and made.data.eval_results[0].dataset_type == "corpus.txt"


def test_what_a_recipe_may_not_tell_is_not_told(card):
    assert "secret-place" not in str(card())


def test_a_default_recipe_trained_on_the_default_text(card, model_folder):
    (model_folder / "recipe.yaml").write_text("{}\n")
    assert "`python-docs`, the text that bd3lm_hf finds" in card().text


def test_a_folder_without_a_run_claims_nothing(model_folder, tmp_path):
    model = read_contents(model_folder).model
    made = ModelCard(str(make_card(model, model_folder, "me/my-model")))
    assert "## Training" not in made.text and "## Evaluation" not in made.text
    assert "Not recorded in the folder" in made.text
    assert made.data.eval_results is None and "model_name" not in str(made)


def test_a_checkpoint_has_the_recipe_of_its_run_but_not_its_results(model_folder):
    add_run(model_folder.parent)
    made = make_card(read_contents(model_folder).model, model_folder, "me/my-model")
    assert rows(made)["learning rate"] == ["0.001"]
    assert "## Evaluation" not in made.text and made.data.eval_results is None


def test_numbers_that_are_not_finite_are_no_results(card, model_folder):
    results = json.loads((model_folder / "results.json").read_text())
    results["after"] = {**SCORE, "perplexity": float("inf"), "bits_per_byte": None}
    (model_folder / "results.json").write_text(json.dumps(results))
    assert [result.metric_type for result in card().data.eval_results] == ["nll"]


@pytest.mark.parametrize(("name", "kind"), [("recipe.yaml", "YAML"), ("results.json", "JSON")])
def test_a_damaged_file_of_a_run_is_named(card, model_folder, name, kind):
    (model_folder / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is no {kind}, so the model card can not be filled"):
        card()


def test_the_metadata_are_plain_yaml(card):
    block = str(card(license="mit")).split("---")[1]
    content = yaml.safe_load(block)
    assert content["license"] == "mit" and content["model-index"][0]["name"] == "my-model"
