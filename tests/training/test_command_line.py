import re
from dataclasses import fields
from pathlib import Path

import pytest

from bd3lm_hf.training import arguments
from bd3lm_hf.training.arguments import REFUSED_FIELDS, BD3LMTrainingArguments
from bd3lm_hf.training.command_help import RECIPES, fields_in_source, refused_names, train_help
from bd3lm_hf.training.command_line import parse_arguments, read_recipe, write_recipe


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_the_demo_is_the_base_without_a_recipe():
    demo = read_recipe("demo")
    arguments = parse_arguments([])
    assert arguments.data.dataset == demo["dataset"] == "python-docs"
    found = (arguments.model.block_size, arguments.training.max_steps)
    assert found == (demo["block_size"], demo["max_steps"])


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_defaults(recipe):
    path = recipe("max_steps: 7\nhidden_dim: 64\nlearning_rate: 1e-3\neval_strategy: 'no'\nbf16: false\n")
    arguments = parse_arguments([path, "--hidden_dim", "32", "--output-dir", "somewhere"])
    assert (arguments.training.max_steps, arguments.training.output_dir) == (7, "somewhere")
    assert arguments.training.learning_rate == 1e-3  # YAML reads 1e-3 as a string
    assert (arguments.model.hidden_dim, arguments.model.block_size, arguments.data.text_column) == (32, None, None)


@pytest.mark.parametrize("word", ["--model-name-or-path=folder", "--init-from=folder", "--init_from=folder"])
def test_dashes_and_underscores_are_both_accepted(word):
    assert parse_arguments([word, "--max-eval-samples", "3"]).model.init_from == "folder"


def test_the_home_folder_may_be_written_as_a_tilde(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = recipe("output_dir: ~/run\nsample_prompt: ~/x\n")
    arguments = parse_arguments([path, "--dataset=~/text", "--init_from", "~/model"])
    assert (arguments.training.output_dir, arguments.data.dataset) == ("/home/me/run", "/home/me/text")
    assert (arguments.model.init_from, arguments.training.sample_prompt) == ("/home/me/model", "~/x")


def test_only_given_fields_reach_the_configuration(recipe):
    arguments = parse_arguments([recipe("block_size: 8\nnoise: cosine\n"), "--adaln", "false"])
    assert arguments.model.config_fields() == {"block_size": 8, "noise": "cosine", "adaln": False}


def test_a_checkpoint_replaces_the_network_of_the_demo():
    assert parse_arguments(["--init_from", "folder"]).model.config_fields() == {}
    arguments = parse_arguments(["--model_name_or_path", "folder", "--dropout", "0.2", "--block_size", "2"])
    assert arguments.model.init_from == "folder"
    assert arguments.model.config_fields() == {"dropout": 0.2, "block_size": 2}


def test_the_prompt_of_a_shipped_recipe_is_not_used_for_other_text(recipe):
    assert parse_arguments([]).training.sample_prompt
    assert parse_arguments(["--dataset", "my.txt"]).training.sample_prompt == ""
    assert parse_arguments(["--dataset", "my.txt", "--sample_prompt", "Once"]).training.sample_prompt == "Once"
    assert parse_arguments([recipe("sample_prompt: Once\n"), "--dataset", "my.txt"]).training.sample_prompt == "Once"


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_parses_and_saves_checkpoints(name):
    arguments = parse_arguments([name, "--use_cpu"])
    assert arguments.model.model_length % arguments.model.block_size == 0
    assert arguments.training.save_strategy == "steps"
    assert arguments.training.eval_steps % arguments.training.save_steps == 0


@pytest.mark.parametrize("name", ["lm1b", "owt"])
def test_the_recipes_of_the_paper_have_its_batch_and_its_average(name):
    recipe = read_recipe(name)
    assert (recipe["global_batch_size"], recipe["ema_decay"]) == (512, 0.9999)
    assert 512 % recipe["per_device_train_batch_size"] == 0


def test_a_written_recipe_repeats_the_run(recipe, tmp_path):
    given = {"max_steps", "hidden_dim", "lr_scheduler_type", "dropout", "interval_search", "eval_strategy"}
    given |= {"interval_candidates", "interval_search_widths"}
    text = "max_steps: 7\nhidden_dim: 64\nlr_scheduler_type: cosine\ndropout: 0.0\ninterval_search: true\n"
    text += "eval_strategy: steps\ninterval_candidates: [0.3-0.8, 0.45-0.95]\ninterval_search_widths: [0.5, 0.9]\n"
    first = parse_arguments([recipe(text), "--output_dir", "first"])
    write_recipe(first, tmp_path / "again.yaml")
    second = parse_arguments([str(tmp_path / "again.yaml"), "--output_dir", first.training.output_dir])
    assert (second.model, second.data) == (first.model, first.data)
    for name in ("max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "report_to", "eval_strategy"):
        assert getattr(second.training, name) == getattr(first.training, name)
    assert second.training.interval_list(4) == first.training.interval_list(4)
    assert len(first.training.interval_list(4)) == 1 + 11 + 3
    assert set(read_recipe(str(tmp_path / "again.yaml"))) == given


def test_help_lists_our_fields_first_and_names_recipe_and_program(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: bd3lm train [RECIPE]")
    ours, inherited = printed.split("-" * 79)
    for name in ("--block_size", "--dataset", "--overwrite_output_dir", "--learning_rate", "--save_on_signal"):
        assert f"{name}\n" in ours
    assert "--adam_beta1\n" in inherited and "--learning_rate\n" not in inherited
    assert "label_smoothing" not in printed
    monkeypatch.setattr("sys.argv", ["training/train.py"])
    assert train_help().startswith("usage: python training/train.py [RECIPE]")


def test_the_fields_of_the_help_are_those_of_the_classes():
    page = train_help()
    flags = re.findall(r"^  --(\S+)$", page, re.MULTILINE)
    assert len(flags) == len(set(flags)) and "-" not in "".join(flags)  # as typed
    for item in fields(BD3LMTrainingArguments):
        assert (f"  --{item.name}\n" in page) == (item.init and item.name not in REFUSED_FIELDS), item.name
    assert refused_names() == set(REFUSED_FIELDS)
    described = {item.name: item for item in fields_in_source(Path(arguments.__file__))["BD3LMTrainingArguments"]}
    for item in fields(BD3LMTrainingArguments):
        if item.name in described and item.default is not None:
            assert described[item.name].default == str(item.default)
            assert described[item.name].text == item.metadata["help"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("block_sise: 4\n", "'block_sise': did you mean 'block_size'"),
        ("zzzzzzzz: 4\n", "'zzzzzzzz'.*--help"),
        ("- max_steps\n", "list"),
        ("hidden_dim: wide\n", "hidden_dim.*wide"),
        ("hidden_dim: 4.5\n", "hidden_dim.*4.5"),
        ("max_steps: [1, 2]\n", r"max_steps.*\[1, 2\]"),
        ("dataset: {a: 1}\n", r"dataset.*\{'a': 1\}"),
        ("dataset: yes\n", "dataset.*True"),
        ("eval_strategy: no\n", "eval_strategy.*quotes"),
        ("interval_candidates: [[1]]\n", r"interval_candidates.*\[\[1\]\]"),
        ("optim: nosuch\n", "nosuch"),
        ("max_steps: 1\nmax_steps: 2\n", "max_steps.*twice"),
        ("save_strategy: 'no'\nsave_steps: 5\n", "--save_steps 5.*--save_strategy steps"),
    ],
)
def test_a_faulty_recipe_is_refused_by_field_and_value(recipe, text, value):
    with pytest.raises(ValueError, match=value):
        parse_arguments([recipe(text)])


SEARCH = ["--interval_search", "true", "--eval_strategy", "steps"]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["nowhere.yaml"], r"'nowhere.yaml'.*demo.*python-source"),
        (["--learning_rat=1"], "did you mean '--learning_rate'"),
        (["--learning-rat", "1"], "did you mean '--learning_rate'"),
        (["--vocab_size", "0"], "--vocab_size 0"),
        (["--max_eval_samples", "0"], "--max_eval_samples 0"),
        (["--eval_num_samples", "0"], "--eval_num_samples 0"),
        (["--sample_tokens", "-1"], "--sample_tokens -1"),
        (["--num_proc", "0"], "--num_proc 0"),
        (["--shuffle_buffer", "-1"], "--shuffle_buffer -1"),
        (["--lora_r", "0"], "--lora_r 0"),
        (["--lora_r", "4", "--lora_alpha", "0"], "--lora_alpha 0"),
        (["--lora_r", "4", "--lora_dropout", "1"], "--lora_dropout 1.0"),
        (["--lora_r", "8", "--interval_search", "true"], "--interval_search.*--lora_r 8.*--sampling_eps_min"),
        (["--lora_alpha", "8"], "--lora_alpha.*--lora_r"),
        (["--lora_target_modules", "attn_qkv"], "--lora_target_modules.*--lora_r"),
        (["--packing", "tight"], "--packing.*'tight'.*contiguous.*published"),
        (["--long_rows", "cut"], "--long_rows.*'cut'.*error.*drop"),
        (["--data_format", "chat"], "--data_format.*'chat'.*text.*prompt_completion.*messages"),
        (["--data_format", "messages", "--text_column", "body"], "--text_column body.*--data_format"),
        (["--streaming", "true", "--packing", "published"], "--packing published"),
        (["--streaming", "true", "--data_format", "messages"], "--data_format messages"),
        (["--streaming", "true", "--max_train_samples", "8"], "--max_train_samples 8"),
        (["--streaming", "true", "--max_steps", "-1"], "--streaming.*--max_steps"),
        ([*SEARCH, "--interval_search_widths", "1.5"], "interval_search_widths 1.5"),
        ([*SEARCH, "--interval_candidates", "0.8"], "interval_candidates '0.8'.*0.3-0.8"),
        ([*SEARCH, "--interval_search_batches", "0"], "--interval_search_batches 0"),
        ([*SEARCH, "--interval_search_method", "x"], "--interval_search_method.*'x'.*shared.*published"),
        ([*SEARCH[:2], "--eval_strategy", "no"], "--interval_search true.*--eval_strategy"),
        (["--interval_search_fixed", "true"], "--interval_search_fixed.*--interval_search true"),
        (["--interval_candidates", "0.3-0.8"], "--interval_candidates.*--interval_search true"),
        (["--save_strategy", "no", "--save_steps", "5"], "--save_steps 5.*--save_strategy"),
        (["--eval_strategy", "no", "--eval_steps", "5"], "--eval_steps 5.*--eval_strategy"),
        (["--deepspeed", "config.json"], "--deepspeed.*pip install deepspeed"),
    ],
)
def test_values_that_cannot_work_or_have_no_effect_are_refused(words, value):
    with pytest.raises(ValueError, match=value):
        parse_arguments(words)


def test_the_command_line_may_switch_off_what_a_recipe_saves(recipe):
    path = recipe("save_strategy: steps\nsave_steps: 5\neval_strategy: steps\neval_steps: 5\n")
    training = parse_arguments([path, "--save_strategy", "no", "--eval_strategy", "no"]).training
    assert (training.save_strategy, training.eval_strategy) == ("no", "no")


def test_a_search_takes_the_published_candidates_by_default():
    assert len(parse_arguments(SEARCH).training.interval_list(4)) == 36
    own = parse_arguments([*SEARCH, "--interval_candidates", "0.3-0.8", "0.45-0.95"]).training.interval_list(4)
    assert [round(low, 3) for low, _ in own] == [0.001, 0.3, 0.45]
    wide = ["--interval_search_widths", "0.8", "0.9", "--interval_search_step", "0.1"]
    assert len(parse_arguments([*SEARCH, *wide]).training.interval_list(4)) == 1 + 3 + 2


def test_a_stream_asks_how_many_held_out_sequences_to_keep(recipe):
    path = recipe("streaming: true\nmax_steps: 5\n")
    with pytest.raises(ValueError, match="--max_eval_samples.*--validation_dataset"):
        parse_arguments([path])
    assert parse_arguments([path, "--validation_dataset", "wikitext2"]).data.streaming
    assert parse_arguments([path, "--max_eval_samples", "10"]).data.shuffle_buffer == 10_000
