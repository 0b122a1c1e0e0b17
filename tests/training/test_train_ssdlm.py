"""A model without a likelihood trains from end to end: losses instead of perplexities, and all that a run can do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import save_recipe
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM
from transformers.models.roberta import RobertaConfig, RobertaForMaskedLM, RobertaModel

from bd3lm_hf import SSDLMForMaskedLM
from bd3lm_hf.checkpoints import load_model
from bd3lm_hf.evaluation.perplexity import HeldOutLoss
from bd3lm_hf.training.train import run, table


# peft calls a deprecated function of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    fields = {"model_type": "ssdlm", "num_denoising_steps": 3, "max_steps": 4, "eval_strategy": "steps"}
    fields |= {"eval_steps": 2, "eval_num_samples": 2, "final_estimator": None, "cond_dim": None, "use_cpu": True}
    return save_recipe(tmp_path_factory.mktemp("recipe"), **fields)


@pytest.fixture(scope="module")
def corpus(recipe) -> Path:
    return recipe.with_name("text.jsonl")


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["--output_dir", str(folder), "--ema_decay", "0.9", "--max_steps", "30", "--eval_steps", "15"]
    return run([str(recipe), *words]), folder


def test_a_run_reports_losses_and_says_that_there_is_no_perplexity(trained):
    result, folder = trained
    assert isinstance(result.before, HeldOutLoss) and isinstance(result.after, HeldOutLoss)
    assert result.after.loss < result.before.loss - 2 * result.before.standard_error
    assert result.unigram_perplexity is None
    assert result.text.startswith("A block")
    evaluations = [entry for entry in result.losses if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [15, 30]
    assert not any("ppl" in name or "nll" in name or "bits" in name for entry in result.losses for name in entry)
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert written["after"]["loss"] == result.after.loss and "perplexity" not in written["after"]
    printed = table(result)
    assert f"{result.after.loss:.3f} +- {result.after.standard_error:.3f}" in printed
    assert "No perplexity" in printed
    assert "--- sample at step 30 ---\nA block" in (folder / "samples.txt").read_text(encoding="utf-8")
    model = load_model(str(folder))
    assert type(model) is SSDLMForMaskedLM and model.generation_config.num_denoising_steps == 3
    assert (model.config.n_blocks, model.config.hidden_dim, model.config.block_size) == (1, 16, 4)


def test_a_resumed_run_is_the_uninterrupted_one_and_the_layout_of_a_run_changes_no_noise(recipe, tmp_path):
    words = [str(recipe), "--ema_decay", "0.9", "--sample_tokens", "0", "--eval_strategy", "no"]
    words += ["--save_strategy", "steps", "--save_steps", "2"]
    resume = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2")]
    layout = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", "2"]
    results = [
        run([*words, *more, "--output_dir", str(tmp_path / name)])
        for name, more in (("whole", []), ("again", resume), ("parts", layout))
    ]
    whole, resumed, parts = ([entry["loss"] for entry in result.losses if "loss" in entry] for result in results)
    assert whole == resumed and len(whole) == 4
    assert parts == pytest.approx(whole[:2], rel=1e-4)
    states = [load_model(str(tmp_path / name)).state_dict() for name in ("whole", "again")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_adapter_trains_on_a_trained_model(trained, corpus, tmp_path):
    words = ["--init_from", str(trained[1]), "--model_type", "ssdlm", "--dataset", str(corpus), "--use_cpu"]
    words += ["--lora_r", "2", "--max_steps", "2", "--warmup_steps", "0", "--max_eval_samples", "4"]
    words += ["--eval_strategy", "no", "--sample_tokens", "0", "--output_dir", str(tmp_path / "adapter")]
    words += ["--block_size", "4", "--model_length", "32", "--eval_num_samples", "2"]
    result = run([*words, "--per_device_train_batch_size", "4"])
    assert result.before.loss == pytest.approx(trained[0].after.loss, abs=1e-4)
    merged, base = (load_model(str(folder)).state_dict() for folder in (tmp_path / "adapter", trained[1]))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and all("attention" in name or "intermediate" in name or "output" in name for name in changed)


@pytest.fixture
def encoder(tiny_tokenizer, tmp_path):
    """A function that saves a masked language model with its tokenizer, and returns its folder."""

    def save(config=RobertaConfig, head=RobertaForMaskedLM, **fields) -> str:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        sizes |= {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 48, "pad_token_id": 2, **fields}
        torch.manual_seed(0)
        head(config(**sizes)).save_pretrained(tmp_path / "encoder")
        tiny_tokenizer.save_pretrained(tmp_path / "encoder")
        return str(tmp_path / "encoder")

    return save


def words_of(folder: str, corpus: Path, output: Path, *more: str) -> list[str]:
    words = ["--model_type", "ssdlm", "--init_from", folder, "--dataset", str(corpus), "--output_dir", str(output)]
    words += ["--block_size", "4", "--model_length", "32", "--max_steps", "1", "--warmup_steps", "0", "--use_cpu"]
    words += ["--learning_rate", "1e-9", "--weight_decay", "0", "--max_eval_samples", "4", "--eval_strategy", "no"]
    return [*words, "--sample_tokens", "0", "--per_device_train_batch_size", "4", *more]


@pytest.mark.parametrize("kind", [(RobertaConfig, RobertaForMaskedLM), (BertConfig, BertForMaskedLM)])
def test_training_starts_from_an_encoders_weights(encoder, corpus, tiny_tokenizer, tmp_path, kind):
    folder = encoder(*kind)
    run(words_of(folder, corpus, tmp_path / "run", "--dropout", "0.0"))
    model, old = load_model(str(tmp_path / "run")), AutoModelForMaskedLM.from_pretrained(folder)
    for name, weight in old.state_dict().items():
        torch.testing.assert_close(model.model.state_dict()[name], weight, atol=1e-6, rtol=0)
    words = old.get_input_embeddings().weight
    torch.testing.assert_close(model.embed_sum.weight, words.T, atol=1e-6, rtol=0)
    config = model.config
    assert (config.block_size, config.model_length, config.hidden_dim, config.n_blocks) == (4, 32, 16, 2)
    assert (config.mask_token_id, config.eos_token_id) == (tiny_tokenizer.mask_token_id, tiny_tokenizer.eos_token_id)
    assert (config.dropout, config.encoder_config.hidden_dropout_prob) == (0.0, 0.0)


def test_a_pooler_is_left_out_with_a_warning_and_a_missing_head_is_an_error(encoder, corpus, tmp_path, caplog):
    folder = Path(encoder())
    whole = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
    pooled = {"roberta.pooler.dense.weight": torch.zeros(16, 16)}
    save_file({k: v.clone() for k, v in whole.items()} | pooled, folder / "model.safetensors", {"format": "pt"})
    run(words_of(str(folder), corpus, tmp_path / "run"))
    assert any("roberta.pooler.dense.weight are left out" in record.getMessage() for record in caplog.records)
    RobertaModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"--init_from .* has \d+ missing weights \(lm_head"):
        run(words_of(str(folder), corpus, tmp_path / "again"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--hidden_dim", "32"), "--hidden_dim 32 contradicts --init_from .*, whose hidden_dim is 16"),
        (("--cond_dim", "8"), "--cond_dim 8.*leave out --cond_dim"),
        (("--noise", "loglinear"), "--noise loglinear: a SSDLMConfig has no such field; leave out --noise"),
        (("--model_length", "64"), "model_length=64 does not fit the encoder's max_position_embeddings=48: give at"),
        (("--num_denoising_steps", "0"), "--num_denoising_steps 0:"),
        (("--lora_r", "2"), "--lora_r: an adapter is used with the configuration of"),
    ],
)
def test_what_does_not_fit_an_encoder_is_refused(encoder, corpus, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run(words_of(encoder(), corpus, tmp_path / "run", *more))
