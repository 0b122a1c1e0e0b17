import pytest
import torch

from bd3lm_hf.training.arguments import (
    RECIPES,
    BD3LMTrainingArguments,
    parse_arguments,
    read_recipe,
    write_recipe,
)


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
    assert arguments.model.block_size == demo["block_size"]
    assert arguments.training.max_steps == demo["max_steps"]


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_defaults(recipe):
    path = recipe("max_steps: 7\nhidden_dim: 64\nlearning_rate: 1e-3\neval_strategy: 'no'\nbf16: false\n")
    arguments = parse_arguments([path, "--hidden_dim", "32", "--output-dir", "somewhere"])
    assert arguments.training.max_steps == 7
    assert arguments.model.hidden_dim == 32
    assert arguments.training.learning_rate == 1e-3  # YAML reads 1e-3 as a string
    assert arguments.training.output_dir == "somewhere"
    assert arguments.model.block_size is None
    assert arguments.data.text_column is None


def test_defaults_are_the_papers_optimisation():
    training = BD3LMTrainingArguments()
    assert training.learning_rate == 3e-4
    assert training.warmup_steps == 2500
    assert training.lr_scheduler_type == "constant_with_warmup"
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (training.weight_decay, training.max_grad_norm) == (0.0, 1.0)


def test_only_given_fields_reach_the_configuration(recipe):
    arguments = parse_arguments([recipe("block_size: 8\nnoise: cosine\n"), "--adaln", "false"])
    assert arguments.model.config_fields() == {"block_size": 8, "noise": "cosine", "adaln": False}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_parses(name):
    arguments = parse_arguments([name, "--use_cpu"])
    assert arguments.model.model_length % arguments.model.block_size == 0


def test_a_written_recipe_repeats_the_run(recipe, tmp_path):
    first = parse_arguments([recipe("max_steps: 7\nhidden_dim: 64\nlr_scheduler_type: cosine\ndropout: 0.0\n")])
    write_recipe(first, tmp_path / "again.yaml")
    second = parse_arguments([str(tmp_path / "again.yaml"), "--output_dir", first.training.output_dir])
    assert second.model == first.model
    assert second.data == first.data
    for name in ("max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "report_to", "eval_strategy"):
        assert getattr(second.training, name) == getattr(first.training, name)
    assert set(read_recipe(str(tmp_path / "again.yaml"))) == {
        "max_steps",
        "hidden_dim",
        "lr_scheduler_type",
        "dropout",
    }


def test_help_lists_our_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in ("--block_size", "--dataset", "--overwrite_output_dir", "--learning_rate"):
        assert name in printed


def test_an_unknown_recipe_field_is_named_with_the_nearest_one(recipe):
    with pytest.raises(ValueError, match=r"unknown field 'block_sise': did you mean 'block_size'\?"):
        parse_arguments([recipe("block_sise: 4\n")])


def test_an_unknown_recipe_field_without_a_near_one_points_to_the_help(recipe):
    with pytest.raises(ValueError, match=r"unknown field 'zzzzzzzz': see --help"):
        parse_arguments([recipe("zzzzzzzz: 4\n")])


@pytest.mark.parametrize("word", ["--learning_rat=1", "--learning-rat"])
def test_an_unknown_argument_is_named_with_the_nearest_one(word):
    with pytest.raises(ValueError, match=r"unknown argument .*did you mean '--learning_rate'\?"):
        parse_arguments([word, "1"] if "=" not in word else [word])


def test_a_recipe_that_does_not_exist_lists_those_that_ship():
    with pytest.raises(ValueError, match=r"no recipe 'nowhere.yaml'.*demo.*python-source"):
        parse_arguments(["nowhere.yaml"])


@pytest.mark.parametrize("text", ["a: [1\n", "a: \x00\n"])
def test_a_broken_recipe_is_one_line(recipe, text):
    with pytest.raises(ValueError, match="is no readable YAML") as error:
        parse_arguments([recipe(text)])
    assert "\n" not in str(error.value)


def test_a_recipe_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"sample_prompt: caf\xe9\n")
    with pytest.raises(ValueError, match="is no readable YAML"):
        parse_arguments([str(path)])


def test_a_recipe_that_is_a_list_is_refused(recipe):
    with pytest.raises(ValueError, match="holds a list: write one `field: value` per line"):
        parse_arguments([recipe("- max_steps\n")])


@pytest.mark.parametrize("text", ["hidden_dim: wide\n", "hidden_dim: 4.5\n", "max_steps: [1, 2]\n"])
def test_a_value_of_the_wrong_kind_is_refused(recipe, text):
    field = text.split(":")[0]
    with pytest.raises(ValueError, match=rf"{field}|unrecognized|unknown"):
        parse_arguments([recipe(text)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab_size", "0"], "--vocab_size 0"),
        (["--max_eval_samples", "0"], "--max_eval_samples 0"),
        (["--eval_num_samples", "0"], "--eval_num_samples 0"),
        (["--sample_tokens", "-1"], "--sample_tokens -1"),
        (["--num_proc", "0"], "--num_proc 0"),
        (["--shuffle_buffer", "-1"], "--shuffle_buffer -1"),
        (["--lora_r", "0"], "--lora_r 0"),
        (["--lora_r", "4", "--lora_alpha", "0"], "--lora_alpha 0"),
        (["--lora_r", "4", "--lora_dropout", "1"], "--lora_dropout 1.0"),
    ],
)
def test_counts_below_their_least_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)


SEARCH = ["--interval_search", "true", "--eval_strategy", "steps"]


def test_a_search_takes_the_published_candidates_unless_told_otherwise():
    assert len(parse_arguments(SEARCH).training.interval_list(4)) == 36
    own = parse_arguments([*SEARCH, "--interval_candidates", "0.3-0.8", "0.45-0.95"]).training.interval_list(4)
    assert [round(low, 3) for low, _ in own] == [0.001, 0.3, 0.45]
    wide = ["--interval_search_widths", "0.8", "0.9", "--interval_search_step", "0.1"]
    assert len(parse_arguments([*SEARCH, *wide]).training.interval_list(4)) == 1 + 3 + 2


def test_a_written_recipe_repeats_a_search(recipe, tmp_path):
    text = "interval_search: true\neval_strategy: steps\ninterval_candidates: [0.3-0.8, 0.45-0.95]\n"
    first = parse_arguments([recipe(text + "interval_search_widths: [0.5, 0.9]\n")])
    write_recipe(first, tmp_path / "again.yaml")
    second = parse_arguments([str(tmp_path / "again.yaml")])
    assert second.training.interval_list(4) == first.training.interval_list(4)
    assert len(first.training.interval_list(4)) == 1 + 11 + 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SEARCH, "--interval_search_widths", "1.5"], "interval_search_widths 1.5: give widths above 0 and up to 1"),
        ([*SEARCH, "--interval_search_step", "0"], "interval_search_step 0.0: give a step above 0"),
        ([*SEARCH, "--interval_candidates", "0.8-0.3"], "interval_candidates 0.8-0.3: write the lower end first"),
        ([*SEARCH, "--interval_candidates", "0.8"], "interval_candidates '0.8': write two numbers, as in 0.3-0.8"),
        ([*SEARCH, "--interval_search_batches", "0"], "--interval_search_batches 0: give a whole number"),
        ([*SEARCH, "--interval_search_method", "x"], "--interval_search_method x: choose one of shared, published"),
        ([*SEARCH[:2], "--eval_strategy", "no"], "--interval_search true searches at each evaluation: set --eval_str"),
        (["--interval_search_fixed", "true"], "--interval_search_fixed asks for a search.*add --interval_search true"),
        (["--interval_candidates", "0.3-0.8"], "--interval_candidates asks for a search of the interval"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)


def test_a_checkpoint_replaces_the_demos_network():
    arguments = parse_arguments(["--init_from", "folder"])
    assert arguments.model.config_fields() == {}


def test_fields_may_change_with_a_checkpoint():
    arguments = parse_arguments(["--model_name_or_path", "folder", "--dropout", "0.2", "--block_size", "2"])
    assert arguments.model.init_from == "folder"
    assert arguments.model.config_fields() == {"dropout": 0.2, "block_size": 2}


def test_processes_that_would_each_train_alone_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ValueError, match="the launcher started 2 processes but this run sees 1.*--use_cpu"):
        BD3LMTrainingArguments(output_dir=str(tmp_path))


def test_a_place_to_report_to_must_be_installed(monkeypatch):
    installed = "bd3lm_hf.training.arguments.get_available_reporting_integrations"
    monkeypatch.setattr(installed, lambda: ["tensorboard"])
    message = (
        "--report_to wandb: the package wandb is not installed. Run `pip install wandb`, or report to tensorboard or"
    )
    with pytest.raises(ValueError, match=message):
        BD3LMTrainingArguments(report_to="wandb")
    assert BD3LMTrainingArguments(report_to="tensorboard").report_to == ["tensorboard"]
    monkeypatch.setattr(installed, lambda: ["tensorboard", "wandb"])
    assert BD3LMTrainingArguments(report_to=["tensorboard", "wandb"]).report_to == ["tensorboard", "wandb"]


@pytest.mark.parametrize("peak", [0.0, -1.0, float("nan")])
def test_a_peak_is_above_zero(peak):
    with pytest.raises(ValueError, match="--peak_tflops .*: give a number above 0, or leave it out"):
        BD3LMTrainingArguments(peak_tflops=peak)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--packing", "tight"], "--packing tight: choose one of contiguous, published"),
        (["--long_rows", "cut"], "--long_rows cut: choose one of error, drop"),
        (["--data_format", "chat"], "--data_format chat: choose one of text, prompt_completion, messages"),
        (
            ["--data_format", "messages", "--text_column", "body"],
            "--text_column body contradicts --data_format",
        ),
        (["--streaming", "true", "--packing", "published"], "--packing published needs the whole data set"),
        (["--streaming", "true", "--data_format", "messages"], "--data_format messages reads all rows at once"),
        (["--streaming", "true", "--max_train_samples", "8"], "--max_train_samples 8 counts sequences"),
        (["--streaming", "true", "--max_steps", "-1"], "--streaming reads text without an end .* set --max_steps"),
        (["--lora_r", "8", "--interval_search", "true"], "--interval_search with --lora_r 8: .*--sampling_eps_min"),
        (["--lora_alpha", "8"], "--lora_alpha is given without --lora_r"),
        (["--lora_target_modules", "attn_qkv"], "--lora_target_modules is given without --lora_r"),
    ],
)
def test_fields_that_contradict_one_another_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)


def test_a_stream_asks_how_many_held_out_sequences_to_keep(recipe):
    path = recipe("streaming: true\nmax_steps: 5\n")
    with pytest.raises(ValueError, match="say how many with --max_eval_samples, or name them with --validation_data"):
        parse_arguments([path])
    assert parse_arguments([path, "--validation_dataset", "wikitext2"]).data.streaming
    assert parse_arguments([path, "--max_eval_samples", "10"]).data.shuffle_buffer == 10_000


def test_adapters_are_given_by_their_rank(recipe):
    lora = parse_arguments([recipe("lora_r: 8\nlora_target_modules: [attn_qkv, mlp.0]\n")]).lora
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.0)
    assert lora.lora_target_modules == ["attn_qkv", "mlp.0"]


# The global batch


def arguments_of(folder, **fields) -> BD3LMTrainingArguments:
    defaults = {"output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 8}
    return BD3LMTrainingArguments(**{**defaults, **fields})


@pytest.mark.parametrize(
    ("processes", "device", "accumulated"), [(1, 8, 64), (8, 16, 4), (32, 16, 1), (1, 512, 1), (4, 128, 1)]
)
def test_the_global_batch_decides_the_accumulation(tmp_path, processes, device, accumulated):
    # Two processes of a real run are in two_processes.py.
    arguments = arguments_of(tmp_path, per_device_train_batch_size=device)
    arguments.global_batch_size = 512
    assert arguments._accumulation(processes) == accumulated
    alone = arguments_of(tmp_path, per_device_train_batch_size=device, global_batch_size=512)
    assert alone.gradient_accumulation_steps == 512 // device


@pytest.mark.parametrize(
    ("processes", "device", "wanted", "nearest"), [(3, 8, 512, 504), (8, 128, 512, 1024), (1, 8, 0, 8), (2, 4, 12, 16)]
)
def test_a_global_batch_that_does_not_divide_names_the_nearest(tmp_path, processes, device, wanted, nearest):
    arguments = arguments_of(tmp_path, per_device_train_batch_size=device)
    arguments.global_batch_size = wanted
    message = f"--global_batch_size {wanted} is no multiple of {processes} processes x --per_device_train_batch_size "
    message += f"{device}: the nearest that works is {nearest}"
    with pytest.raises(ValueError, match=message):
        arguments._accumulation(processes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_batch_size": 12}, "--global_batch_size 12 is no multiple of 1 processes x .* works is 16"),
        (
            {"global_batch_size": 16, "gradient_accumulation_steps": 3},
            "--gradient_accumulation_steps 3 contradicts --global_batch_size 16, which takes 2",
        ),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True .* set --global_batch_size"),
        ({"global_batch_size": 8, "auto_find_batch_size": True}, "--global_batch_size 8 needs a batch size per"),
        ({"ema_decay": 1.0}, r"--ema_decay 1\.0: give a number from 0"),
        ({"ema_decay": -0.5}, r"--ema_decay -0\.5: give a number from 0"),
    ],
)
def test_fields_that_can_not_work_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        arguments_of(tmp_path, **fields)


def test_an_accumulation_that_agrees_with_the_global_batch_is_taken(tmp_path):
    both = arguments_of(tmp_path, global_batch_size=16, gradient_accumulation_steps=2)
    assert both.gradient_accumulation_steps == 2


@pytest.mark.parametrize("name", ["lm1b", "owt", "text8"])
def test_the_papers_recipes_have_its_batch_and_its_average(name):
    recipe = read_recipe(name)
    assert (recipe["global_batch_size"], recipe["ema_decay"]) == (512, 0.9999)
    assert 512 % recipe["per_device_train_batch_size"] == 0
