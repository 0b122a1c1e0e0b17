import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_cli import changed_weights
from tiny_runs import save_recipe
from transformers import AutoTokenizer
from two_processes import run_recipes

from bd3lm_hf.cli import main as cli
from bd3lm_hf.data import load_text, pack
from bd3lm_hf.evaluation.perplexity import perplexity
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.training.command_line import read_recipe
from bd3lm_hf.training.train import TrainResult, main, run, score_before, summary_at_start


HEAD = "backbone.output_layer.linear.bias"
SCRIPT = Path(__file__).resolve().parents[2] / "training" / "train.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return save_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def corpus(recipe) -> Path:
    """Forty small documents."""
    return recipe.with_name("text.jsonl")


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """The result of a tiny run, and its folder."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    result = run([str(recipe), "--output_dir", str(folder), "--eval_strategy", "steps", "--eval_steps", "2"])
    return result, folder


def call(*words: object, cwd: Path, **changes: str) -> subprocess.CompletedProcess:
    """Run Python without anything in its environment that would put the checkout on the path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)


def logged(result: TrainResult, key: str) -> list[float]:
    return [entry[key] for entry in result.losses if key in entry]


# A run from end to end


def test_a_run_reports_what_it_did(trained, recipe):
    result, folder = trained
    assert (result.world_size, result.steps, result.global_batch_size) == (1, 3, 4)
    assert len(logged(result, "loss")) == 3
    assert result.after.perplexity < result.before.perplexity and result.unigram_perplexity > 1
    assert result.text.startswith("A block")
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (written["after"]["nll"], written["world_size"]) == (result.after.nll, 1)
    assert set(written["versions"]) == {"bd3lm_hf", "torch", "transformers", "accelerate"}
    given = read_recipe(str(recipe)) | {"eval_strategy": "steps", "eval_steps": 2}
    assert read_recipe(str(folder / "recipe.yaml")) == given  # which repeats the run


def test_a_run_leaves_its_curve_and_a_sample_of_each_evaluation(trained):
    curve = json.loads((trained[1] / "training_curve.json").read_text(encoding="utf-8"))
    assert curve["loss"] == {"steps": [1, 2, 3], "values": logged(trained[0], "loss")}
    assert {"eval_nll", "eval_ppl", "eval_bits_per_byte", "tokens_per_second", "tflops_per_second"} <= set(curve)
    assert (trained[1] / "training_curve.png").stat().st_size > 1000
    assert "--- sample at step 2 ---\nA block" in (trained[1] / "samples.txt").read_text(encoding="utf-8")


def test_full_diffusion_continues_in_small_blocks_as_the_paper_trains(recipe, corpus, tmp_path):
    words = ["--block_size", "32", "--final_estimator", "stratified", "--sample_tokens", "0"]
    run([str(recipe), *words, "--output_dir", str(tmp_path / "full")])
    words = ["--init_from", str(tmp_path / "full"), "--block_size", "4", "--dataset", str(corpus), "--use_cpu"]
    words += ["--max_steps", "3", "--warmup_steps", "2", "--learning_rate", "0.01", "--noise_draws", "2"]
    words += ["--per_device_train_batch_size", "4", "--max_eval_samples", "4", "--logging_steps", "1"]
    words += ["--final_estimator", "exact", "--eval_strategy", "no", "--sample_tokens", "0"]
    result = run([*words, "--output_dir", str(tmp_path / "blocks")])
    # It starts from the score of the old weights on the text in blocks of 4.
    old = BD3LMForMaskedLM.from_pretrained(tmp_path / "full", block_size=4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "full")
    rows = pack(load_text(str(corpus), split="validation"), tokenizer, length=32)
    rows = rows.select(range(0, len(rows), -(-len(rows) // 4)))
    assert result.before.nll == pytest.approx(perplexity(old, rows, estimator="exact").nll, abs=1e-5)
    assert result.after.nll < result.before.nll
    # Optimizer, schedule and step count start again.
    assert [entry["step"] for entry in result.losses if "loss" in entry] == [1, 2, 3]
    assert logged(result, "learning_rate") == pytest.approx([0.0, 0.005, 0.01])
    config = BD3LMConfig.from_pretrained(tmp_path / "blocks")
    assert (config.block_size, config.noise_draws, config.cross_attn) == (4, 2, True)


def test_a_run_that_searches_its_interval_writes_numbers_and_a_plot(recipe, tmp_path):
    words = [str(recipe), "--output_dir", str(tmp_path / "run"), "--eval_strategy", "steps", "--eval_steps", "1"]
    words += ["--interval_search", "true", "--interval_candidates", "0.3-0.8", "0.45-0.95", "--max_steps", "2"]
    run([*words, "--max_steps", "1"])
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        run(words)
    result = run([*words, "--overwrite_output_dir"])  # starts the files again
    lines = (tmp_path / "run" / "interval_search.jsonl").read_text(encoding="utf-8").splitlines()
    searches = [json.loads(line) for line in lines]
    assert [(search["step"], len(search["candidates"])) for search in searches] == [(1, 3), (2, 3)]
    assert (tmp_path / "run" / "interval_search.png").read_bytes().startswith(b"\x89PNG")
    ends = [logged(result, name)[-1] for name in ("interval_min", "interval_max")]
    assert ends == pytest.approx(searches[-1]["interval"])


def test_a_run_is_resumed_from_the_last_checkpoint_that_is_complete(recipe, tmp_path, caplog):
    folder = tmp_path / "run"
    words = [str(recipe), "--output_dir", str(folder), "--save_strategy", "steps", "--save_steps", "1"]
    whole = run(words)
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"cut")
    shutil.rmtree(folder / "checkpoint-1")
    resumed = run([*words, "--resume_from_checkpoint", "true"])
    assert "checkpoint-3 is not complete and is skipped: optimizer.pt has 3 bytes instead of" in caplog.text
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert resumed.after.nll == whole.after.nll


def test_a_run_that_continues_elsewhere_keeps_the_original_checkpoints(recipe, tmp_path, capsys):
    run([str(recipe), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--save_strategy", "steps"])
    saved = tmp_path / "run" / "checkpoint-1"
    words = [str(recipe), "--resume_from_checkpoint", str(saved), "--save_strategy", "steps", "--save_steps", "1"]
    elsewhere = tmp_path / "elsewhere"
    resumed = run([*words, "--output_dir", str(elsewhere), "--sample_tokens", "0"])
    assert sorted(path.name for path in elsewhere.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert [entry["step"] for entry in resumed.losses if "loss" in entry] == [1, 2, 3]
    with pytest.raises(SystemExit):
        main([*words, "--output_dir", str(elsewhere)])
    assert "has checkpoints of an earlier run, the last one checkpoint-3" in capsys.readouterr().err


# Ways to start a run


def test_the_script_runs_from_its_own_folder_where_nothing_is_installed(tmp_path):
    # -S hides site-packages' .pth files, including an editable install; the libraries come from PYTHONPATH.
    libraries = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    done = call("-S", SCRIPT.name, "--dataset", tmp_path / "no.txt", cwd=SCRIPT.parent, PYTHONPATH=libraries)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "no.txt" in done.stderr, done.stderr


def test_accelerate_launches_the_script_in_two_processes_and_it_prints_one_table(recipe, tmp_path):
    command = ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    command += ["--config_file", SCRIPT.parent / "launch" / "cpu2.yaml", SCRIPT.name, recipe]
    done = call(*command, "--output_dir", tmp_path / "run", "--max_steps", 1, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    for row in ("before training", "after training", "unigram baseline", "Text from the saved folder"):
        assert done.stdout.count(row) == 1
    assert json.loads((tmp_path / "run" / "results.json").read_text())["world_size"] == 2


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The folder and the results of one process that does the work of two."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_recipes(recipe, folder, 1)


def test_two_processes_take_the_same_steps_as_one(two_processes, alone):
    one = alone[1]["rows"]
    for results in two_processes[1]:
        two = results["recipes"]["rows"]
        assert (one.world_size, two.world_size) == (1, 2)
        assert one.global_batch_size == two.global_batch_size == 8
        for key in ("loss", "eval_nll", "interval_min", "interval_max"):
            assert len(logged(one, key)) >= 2
            assert logged(one, key) == pytest.approx(logged(two, key), abs=1e-6)
        for mine, other in ((one.before, two.before), (one.after, two.after)):
            assert (mine.nll, mine.num_tokens) == (pytest.approx(other.nll, abs=1e-6), other.num_tokens)
    folders = (alone[0], two_processes[0] / "recipes")
    weights, others = (load_file(folder / "rows" / "model.safetensors") for folder in folders)
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=0, atol=1e-6, msg=name)


def test_two_processes_read_a_stream_as_one_does_and_resume_where_it_was(two_processes, alone):
    losses = logged(alone[1]["stream"], "loss")
    assert len(losses) == 5
    for results in two_processes[1]:
        assert logged(results["recipes"]["stream"], "loss") == pytest.approx(losses, abs=1e-6)
        assert logged(results["recipes"]["resumed"], "loss") == logged(results["recipes"]["stream"], "loss")
        assert results["recipes"]["resumed"].before is None


# Fine-tuning


@pytest.fixture(scope="module")
def pairs(corpus) -> Path:
    path = corpus.with_name("pairs.jsonl")
    rows = [{"prompt": f"Count {i % 5}:", "completion": "zzzzzzzz"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_adapters_learn_completions_and_write_them(trained, pairs, tmp_path, capsys):
    folder = tmp_path / "adapter"
    words = ["--init_from", str(trained[1]), "--dataset", str(pairs), "--output_dir", str(folder), "--lora_r", "8"]
    words += ["--max_steps", "60", "--warmup_steps", "0", "--learning_rate", "0.02", "--eval_strategy", "no"]
    words += ["--final_estimator", "exact", "--sample_prompt", "Count 1:", "--sample_tokens", "16", "--use_cpu"]
    words += ["--lora_target_modules", "attn_qkv", "attn_out", "mlp.0", "mlp.2", "adaLN_modulation", "linear"]
    result = run(words)
    assert result.after.perplexity < 0.1 * result.before.perplexity
    assert result.text.startswith("Count 1:z")
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    assert cli(["generate", "--model", str(folder), "--prompt", "Count 1:", "--max-new-tokens", "8", "--greedy"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Count 1:z")
    words = ["--model", str(folder), "--dataset", str(pairs), "--estimator", "exact"]
    assert cli(["eval", *words, "--output", str(tmp_path / "eval.json")]) == 0
    scored = json.loads((tmp_path / "eval.json").read_text())
    assert scored["nll"] == pytest.approx(result.after.nll, rel=1e-4)
    assert scored["num_tokens"] == result.after.num_tokens  # without the prompts
    assert scored["packing"] is scored["bits_per_byte"] is None


def test_adapters_need_a_model_that_is_not_an_adapter_itself(recipe, trained, pairs, tmp_path):
    with pytest.raises(ValueError, match="--lora_r 4 adapts a trained model: name one with --init_from"):
        run([str(recipe), "--lora_r", "4", "--output_dir", str(tmp_path / "run")])
    words = ["--init_from", str(trained[1]), "--dataset", str(pairs), "--lora_r", "2", "--max_steps", "1"]
    words += ["--output_dir", str(tmp_path / "adapter"), "--sample_tokens", "0", "--use_cpu", "--eval_strategy", "no"]
    words += ["--final_estimator", "stratified"]
    run(words)
    with pytest.raises(ValueError, match=r"--block_size 8 with --lora_r: .* whose block_size is 4"):
        run([*words, "--block_size", "8", "--overwrite_output_dir"])
    words[1] = str(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"--lora_r 2 would adapt the adapter .*merge"):
        run([*words, "--output_dir", str(tmp_path / "again")])
    assert run([*words[:4], *words[6:], "--output_dir", str(tmp_path / "again")]).steps == 1  # all weights of both


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # A new model is checked before any text is loaded.
        (["--block_size", "5", "--dataset", "nowhere.txt"], "block_size=5 does not divide model_length=32"),
        (["--n_heads", "3"], "hidden_dim=16 is not divisible by n_heads=3"),
        (["--noise", "linear"], "noise='linear'"),
        (["--model_type", "bd3ln"], "--model_type bd3ln is unknown"),
        (["--dataset", "nowhere.txt"], "nowhere.txt"),
        (["--packing", "\x1b[2K hf_abcdef"], "'\\x1b[2K hf_***' (choose from"),
        (["--text_column", "body"], "has no column 'body'"),
        (["--vocab_size", "20"], "vocab_size is 20"),
        (["--tokenizer", "no/such/folder"], "no/such/folder"),
        (["--init_from", "no/such/folder"], "no/such/folder"),
        (["--resume_from_checkpoint", "true"], "--resume_from_checkpoint true:"),
        (["--resume_from_checkpoint", "no/such"], "no/such"),
        (["--eval_estimator", "guess", "--eval_strategy", "epoch"], "--eval_estimator guess"),
        (
            ["--block_size=16", "--final_estimator=sampled", "--eval_strategy=epoch", "--eval_estimator=exact"],
            "--eval_estimator exact does not fit: estimator='exact' at block_size=16",
        ),
        (["--time_conditioning", "true", "--final_estimator", "exact"], "--final_estimator exact"),
        (["--metric_for_best_model=f1", "--eval_strategy=epoch"], "--metric_for_best_model f1: choose one of loss"),
        (["--sample_prompt", "a <|mask|>"], "--sample_prompt 'a <|mask|>'"),
        (["--num_train_epochs", "nan", "--max_steps", "-1"], "--num_train_epochs nan"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size 0"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(recipe, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        main([str(recipe), "--output_dir", str(tmp_path / "run"), *words])
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert message in lines[-1] and not any("Traceback" in line for line in lines)


def test_a_broken_checkpoint_is_refused_before_training(trained, corpus, tmp_path):
    checkpoint = shutil.copytree(trained[1], tmp_path / "checkpoint")
    changed_weights(lambda w: w[HEAD].fill_(torch.nan))(checkpoint)
    with pytest.raises(ValueError, match=f"values of {HEAD} in .* are NaN"):
        run(["--init_from", str(checkpoint), "--dataset", str(corpus), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# The demo


@pytest.mark.slow
def test_the_demo_beats_the_unigram_baseline_within_its_time(tmp_path):
    done = call(SCRIPT, "--output_dir", tmp_path / "demo", cwd=tmp_path, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "demo" / "results.json").read_text(encoding="utf-8"))
    assert result["before"]["perplexity"] > result["unigram_perplexity"]
    assert result["after"]["perplexity"] < 0.6 * result["unigram_perplexity"]
    assert result["seconds"] < 600  # five minutes on two free cores; test machines are shared
    assert result["text"].startswith("The method returns")
    assert AutoTokenizer.from_pretrained(tmp_path / "demo").mask_token_id is not None


# Before the first step


@pytest.mark.parametrize(("on_start", "count"), [(False, 100), (True, 250)])
def test_scores_before_the_first_step_are_spread_over_the_whole_set(on_start, count):
    trainer = SimpleNamespace(args=SimpleNamespace(eval_on_start=on_start), score=lambda *rows, **options: options)
    scored = score_before(trainer, SimpleNamespace(validation=range(250)), "exact")
    assert scored == {"estimator": "exact", "indices": [i * 250 // count for i in range(count)]}


def test_the_summary_counts_what_a_run_is_made_of(tiny_model, caplog):
    training = SimpleNamespace(max_steps=7, bf16=True, fp16=False, device="cpu", world_size=2, output_dir="out")
    data = SimpleNamespace(dataset="books", validation_dataset=None)
    arguments = SimpleNamespace(training=training, data=data, model=SimpleNamespace(init_from=None))
    trainer = SimpleNamespace(model=tiny_model, get_total_train_batch_size=lambda args: 8)
    sequences = SimpleNamespace(train=range(40), validation=range(3))
    text = summary_at_start(arguments, trainer, sequences, resume="out/checkpoint-5")
    count = sum(parameter.numel() for parameter in tiny_model.parameters())
    parts = (f"{count:,} parameters", "40 sequences", "3 sequences of books", "7 of 8 sequences")
    for part in (*parts, "256 tokens", "cpu, bfloat16", "out/checkpoint-5"):
        assert part in text
    assert "3 sequence(s)" in caplog.text
