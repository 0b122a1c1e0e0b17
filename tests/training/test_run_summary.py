"""A run says what it is before its first step, and scores the held-out text for a tenth of its time at most."""

from types import SimpleNamespace

import pytest

from bd3lm_hf.evaluation.perplexity import Perplexity
from bd3lm_hf.training import run_summary
from bd3lm_hf.training.run_summary import score_before, summary_at_start


class Scorer:
    """A trainer whose scores take a second for each sequence."""

    def __init__(self, eval_on_start: bool = False) -> None:
        self.args = SimpleNamespace(eval_batch_size=2, world_size=1, eval_on_start=eval_on_start)
        self.scored: list[list[int]] = []

    def score(self, rows, *, estimator, indices):
        self.scored.append(indices)
        numbers = {"bits_per_token": 1.4, "bits_per_byte": None, "standard_error": 0.1, "num_tokens": 10}
        return Perplexity(1.0, 2.7, num_sequences=len(indices), seconds=float(len(indices)), **numbers)


@pytest.mark.parametrize(
    ("training_seconds", "count"),
    [(50.0, 5), (1.0, 2), (10_000.0, 20), (float("inf"), 20)],  # a tenth, one batch at least, 20 s at most
)
def test_scoring_before_the_first_step_has_a_budget(monkeypatch, training_seconds, count):
    monkeypatch.setattr(run_summary, "_training_seconds", lambda *run: training_seconds)
    trainer, sequences = Scorer(), SimpleNamespace(validation=range(100))
    assert score_before(trainer, sequences, "exact").num_sequences == count
    assert trainer.scored[-1] == [i * 100 // count for i in range(count)]  # spread over the whole set


def test_eval_on_start_asks_for_the_whole_set(monkeypatch):
    monkeypatch.setattr(run_summary, "_training_seconds", lambda *run: 1.0)
    trainer, sequences = Scorer(eval_on_start=True), SimpleNamespace(validation=range(100))
    assert score_before(trainer, sequences, "exact").num_sequences == 100


def test_the_summary_counts_what_a_run_is_made_of(tiny_model, caplog):
    training = SimpleNamespace(max_steps=7, bf16=True, fp16=False, device="cpu", world_size=2, output_dir="out")
    data = SimpleNamespace(dataset="books", validation_dataset=None)
    arguments = SimpleNamespace(training=training, data=data, model=SimpleNamespace(init_from=None))
    trainer = SimpleNamespace(model=tiny_model, get_total_train_batch_size=lambda args: 8)
    rows = [{"input_ids": [number % 30] * 32} for number in range(40)]
    sequences = SimpleNamespace(train=rows, validation=rows[:3])
    text = summary_at_start(arguments, trainer, sequences, resume="out/checkpoint-5")
    count = sum(parameter.numel() for parameter in tiny_model.parameters())
    parts = (f"{count:,} parameters", "40 sequences", "30 distinct", "3 sequences of books", "7 of 8 sequences")
    for part in (*parts, "256 tokens", "cpu, bfloat16", "out/checkpoint-5"):
        assert part in text
    assert "10 of 40 training sequences" in caplog.text and "3 sequence(s)" in caplog.text
