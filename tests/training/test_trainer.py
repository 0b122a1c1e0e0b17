from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from generating import make_family
from tiny_runs import assert_same_weights, losses_of, packed_stream, rows_of, trained
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from two_processes import Words

from bd3lm_hf.evaluation.perplexity import perplexity
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.training.callbacks import SpeedMeter, sample_text, training_flops
from bd3lm_hf.training.examples import NOISE
from bd3lm_hf.training.trainer import BD3LMTrainer


# Training


@pytest.mark.parametrize(("batch", "draws"), [(1, 1), (4, 2)])
def test_accumulated_batches_equal_one_batch_since_tokens_are_counted(tiny_config, make_trainer, batch, draws):
    tiny_config.noise_draws, rows = draws, rows_of(8).to_list()
    for row in rows[::3]:  # sequences with a long given part weigh less
        row["labels"] = [-100] * 24 + row["labels"][24:]
    # Plain gradient descent: Adam's division by the gradient's size would amplify rounding.
    settings = [{"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size} for size in (8, batch)]
    whole, parts = (trained(make_trainer(rows=Dataset.from_list(rows), optim="sgd", **fields)) for fields in settings)
    assert losses_of(parts) == pytest.approx(losses_of(whole), abs=1e-6)
    assert_same_weights(whole.model, parts.model, atol=1e-6)


def test_the_seed_repeats_a_run_and_changes_it(make_trainer):
    first, second, other = (losses_of(trained(make_trainer(seed=seed))) for seed in (5, 5, 6))
    assert first == second != other


def test_the_speed_counts_operations_and_their_share_of_a_known_peak():
    meter = SpeedMeter(peak_flops=4e12)
    assert meter.since_last_log() == {}
    meter.tokens, meter.flops, meter.seconds = 300, 6e12, 2.0
    assert meter.since_last_log() == {"tokens_per_second": 150.0, "tflops_per_second": 3.0, "mfu": 0.75}
    meter.tokens, meter.seconds = 300, 2.0
    assert meter.since_last_log() == {"tokens_per_second": 150.0}


def test_the_utilisation_is_logged_where_the_peak_is_given(make_trainer):
    known, unknown = trained(make_trainer(peak_tflops=0.5)), trained(make_trainer())
    for entry in known.state.log_history[:-1]:
        assert entry["tokens_per_second"] > 0
        assert entry["mfu"] == pytest.approx(entry["tflops_per_second"] / 0.5, rel=1e-2)
    assert "mfu" not in unknown.state.log_history[0]
    assert known.state.total_flos == 2 * training_flops(known.model, 8, 32)


# Streams


@pytest.fixture
def make_stream_trainer(make_trainer, tiny_config, randomize):
    """A function that makes a trainer, with dropout, of a stream of some thirty sequences."""

    def make(dropout: float = 0.2, length: int = 32, **arguments) -> BD3LMTrainer:
        stream = packed_stream(length)
        tokenizer, tiny_config.dropout = stream.tokenizer, dropout
        tiny_config.vocab_size, tiny_config.mask_token_id = len(tokenizer), tokenizer.mask_token_id
        model = randomize(BD3LMForMaskedLM(tiny_config))
        return make_trainer(model=model, rows=stream, **{"max_steps": 12, **arguments})

    return make


def test_a_stream_resumes_bit_for_bit(make_stream_trainer, tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = trained(make_stream_trainer(save_strategy="steps", save_steps=1, **settings))
    for step in (3, 7, 11):
        rest = make_stream_trainer(**settings)
        rest.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert losses_of(rest) == losses_of(whole)
        assert rest.state.log_history[-2]["epoch"] == 1.0
        assert_same_weights(rest.model, whole.model)


def test_a_stream_needs_the_position_that_a_checkpoint_of_its_own_holds(make_stream_trainer, make_trainer, tmp_path):
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_stream_trainer(output_dir=str(tmp_path / "stream"), **saving).train()
    make_trainer(output_dir=str(tmp_path / "sequences"), **saving).train()
    for start, trainer, message in (
        ("stream", make_stream_trainer(length=16), "data: length was 32 and is 16"),
        ("stream", make_stream_trainer(per_device_train_batch_size=4), "training: global batch size was 8 and is 4"),
        ("stream", make_trainer(), "data: kind was a stream and is sequences"),
        ("sequences", make_stream_trainer(), "data: kind was sequences and is a stream"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run: .*{message}"):
            trainer.train(resume_from_checkpoint=str(tmp_path / start / "checkpoint-1"))
    (tmp_path / "stream" / "checkpoint-1" / "stream.npz").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-1 .*stream\.npz"):
        make_stream_trainer().train(resume_from_checkpoint=str(tmp_path / "stream" / "checkpoint-1"))


def test_a_stream_is_read_by_the_main_process_alone(make_stream_trainer):
    with pytest.raises(ValueError, match="--dataloader_num_workers 1: a stream is read by the main process"):
        make_stream_trainer(dataloader_num_workers=1).train()


# Evaluation


def test_evaluation_is_the_perplexity_of_the_held_out_sequences(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=4)
    trainer.bytes_per_token = 4.0
    metrics = trainer.evaluate()
    expected = perplexity(trainer.model, rows_of(6, seed=1), batch_size=3, seed=5, bytes_per_token=4.0)
    assert metrics["eval_loss"] == metrics["eval_nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert metrics["eval_ppl"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert metrics["eval_bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert trainer.state.log_history[-1]["eval_ppl"] == metrics["eval_ppl"]


def test_several_held_out_sets_are_evaluated_by_name(make_trainer):
    trainer = make_trainer()
    trainer.eval_dataset = {"one": rows_of(2, seed=1), "two": rows_of(2, seed=2)}
    metrics = trainer.evaluate()
    assert metrics["eval_one_ppl"] != metrics["eval_two_ppl"]
    assert trainer.evaluate("one", metric_key_prefix="again")["again_ppl"] == metrics["eval_one_ppl"]
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="needs held-out sequences"):
        trainer.evaluate()


def test_the_check_before_training_allows_unscored_rows_and_metrics_of_several_sets_or_a_subclass(make_trainer):
    rows = rows_of(3, seed=1).to_list()
    rows[0]["labels"] = [-100] * len(rows[0]["labels"])
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    known, own = (make_trainer(**evaluation, metric_for_best_model=name) for name in ("eval_one_ppl", "one_pp"))
    known.eval_dataset = own.eval_dataset = {"one": Dataset.from_list(rows)}
    known.train()
    with pytest.raises(ValueError, match="--metric_for_best_model one_pp: choose one of one_loss"):
        own.check_evaluation()

    class OwnMetrics(type(own)):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "one_pp": 1.0}

    own.__class__ = OwnMetrics
    own.check_evaluation()


def test_predictions_are_the_nll_of_tokens_and_the_mask(make_trainer):
    rows = rows_of(6, seed=1).to_list()
    rows[1] = {name: values[:20] for name, values in rows[1].items()}
    rows[2]["labels"] = [-100] * 8 + rows[2]["labels"][8:]
    rows = Dataset.from_list(rows)
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        nll, mask = prediction.predictions
        return {"mean": float(nll[mask].mean())}

    trainer = make_trainer(per_device_eval_batch_size=4, keywords={"compute_metrics": metrics})
    output = trainer.predict(rows)
    (nll, mask), labels = output.predictions, output.label_ids
    assert nll.shape == mask.shape == labels.shape == (6, 32)
    assert mask.tolist() == [[label != -100 for label in row] for row in labels.tolist()]
    assert not mask[1][20:].any() and not mask[2][:8].any()
    assert labels[0][mask[0]].tolist() == [id for id, used in zip(rows[0]["input_ids"], mask[0], strict=True) if used]
    plain = make_trainer(per_device_eval_batch_size=3).evaluate(rows)
    assert output.metrics["test_nll"] == pytest.approx(plain["eval_nll"], rel=1e-6)
    assert output.metrics["test_mean"] == pytest.approx(plain["eval_nll"], rel=1e-5)
    assert trainer.evaluate(rows)["eval_mean"] == output.metrics["test_mean"]
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("keywords", "value"),
    [
        ({"compute_loss_func": lambda *arguments: None}, "compute_loss_func"),
        ({"preprocess_logits_for_metrics": lambda *arguments: None}, "preprocess_logits_for_metrics"),
        ({"data_collator": SimpleNamespace(mlm=True)}, "mlm=False"),
    ],
)
def test_a_loss_of_another_or_masked_text_is_refused(make_trainer, keywords, value):
    with pytest.raises(ValueError, match=value):
        make_trainer(keywords=keywords)


# Precision and compilation


def test_bfloat16_keeps_the_noise_in_float32_and_stays_close(make_trainer):
    plain, low = make_trainer(), make_trainer(bf16=True)
    dtypes, gradients = set(), []

    def record(module, positional, named):
        dtypes.update(named[name].dtype for name in NOISE)

    low.model.register_forward_pre_hook(record, with_kwargs=True)
    low.model.get_output_embeddings().weight.register_hook(gradients.append)
    trained(plain), trained(low)
    assert dtypes == {torch.float32}
    assert losses_of(low) == pytest.approx(losses_of(plain), rel=1e-2)
    assert losses_of(low) != losses_of(plain)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert next(low.model.parameters()).dtype == torch.float32


def test_deepspeeds_precision_keeps_the_noise_in_float32(make_trainer, monkeypatch):
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin, raising=False)
    prepared = trainer._prepare_inputs({**batch, "other": torch.ones(2)})
    assert prepared["other"].dtype == torch.bfloat16
    for name in NOISE:
        assert prepared[name].dtype == torch.float32 and torch.equal(prepared[name], batch[name])


@pytest.mark.slow
def test_compiled_runs_take_the_same_steps(make_trainer, tmp_path):
    common = {"optim": "sgd", "ema_decay": 0.5, "eval_strategy": "steps", "eval_steps": 2}
    plain, compiled = (trained(make_trainer(**common, torch_compile=flag)) for flag in (False, True))
    for key in ("loss", "eval_nll"):
        assert losses_of(plain, key) == pytest.approx(losses_of(compiled, key), abs=1e-5)
    compiled.save_model()
    saved = BD3LMForMaskedLM.from_pretrained(tmp_path / "run").state_dict()
    for name, average in plain.average.shadows.items():
        torch.testing.assert_close(saved[name], average, rtol=0, atol=1e-5, msg=name)


# Samples


def test_a_sample_leaves_the_random_state_and_the_mode_alone(tiny_model):
    model = tiny_model.train()
    state = torch.get_rng_state()
    first, second = (sample_text(model, Words(), max_new_tokens=5, seed=1, nucleus_p=0.9) for _ in range(2))
    assert first == second and len(first.split()) <= 6 and model.training
    assert torch.equal(torch.get_rng_state(), state)


# transformers' own Trainer


def test_the_stock_trainer_evaluates_alike_and_predicts_the_nll_of_tokens(tiny_model, tmp_path):
    model, rows = tiny_model.train(), rows_of(6, seed=1)
    options = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True}

    def evaluate(batch):
        arguments, metrics = TrainingArguments(**options, per_device_eval_batch_size=batch), []
        trainer = Trainer(model, arguments, eval_dataset=rows, compute_metrics=lambda p: metrics.append(p) or {})
        return trainer.evaluate()["eval_loss"], metrics[0]

    (first, prediction), (second, _) = evaluate(3), evaluate(2)
    assert first == pytest.approx(second, rel=1e-5)  # the same noise whenever and however it evaluates
    nll, mask = prediction.predictions
    assert nll.shape == mask.shape == prediction.label_ids.shape
    assert nll[mask == 1].mean() == pytest.approx(first, rel=1e-4)
    model.config.eval_noise_draws = 64
    exact = perplexity(model, rows, estimator="exact").nll
    assert evaluate(3)[0] == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    "family, fields", [("bd3lm", {}), ("bd3lm", {"time_conditioning": True}), ("sedd", {}), ("ar", {})]
)
def test_the_stock_trainer_evaluates_packed_documents_as_rows_of_their_own(family, fields, tmp_path):
    model = make_family(family, model_length=32, **fields).float()
    rows = [{"input_ids": row["input_ids"][: 9 + i % 4]} for i, row in enumerate(rows_of(6, seed=1))]
    options = {"use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 2}
    arguments = TrainingArguments(output_dir=str(tmp_path), **options)
    trainer = Trainer(model, arguments, data_collator=DataCollatorWithFlattening())
    first, second = trainer.predict(rows), trainer.predict(rows)
    assert first.metrics["test_loss"] == second.metrics["test_loss"]
    nll, mask = (torch.from_numpy(array) for array in first.predictions)
    if family == "ar":
        expected = torch.cat([model.token_nll(torch.tensor([row["input_ids"]])).nll[0, 1:] for row in rows])
        torch.testing.assert_close(nll[mask == 1], expected, rtol=1e-4, atol=1e-4)
    assert int(mask.clamp(min=0).sum()) == sum(len(row["input_ids"]) - 1 for row in rows)
