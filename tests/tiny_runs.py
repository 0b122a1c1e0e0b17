"""Sequences, and the recipe of a run that takes a second, for the tests of training."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from bd3lm_hf.data.streaming import PackedStream
from bd3lm_hf.tokenization import train_tokenizer


SENTENCES = (
    "A block is written from noise, token by token, and then it is never touched again. ",
    "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on. ",
    "Every masked token is revealed once; every revealed token stays as it is. ",
)


def rows_of(count: int, length: int = 32, seed: int = 0) -> Dataset:
    """Sequences of the tiny configuration."""
    ids = torch.randint(3, 47, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * length] * count})


def packed_stream(length: int = 32) -> PackedStream:
    """A shuffled stream of some thirty short sequences of text, always the same."""
    texts = [f"document {i} says: " + "so it goes, " * (i % 5) for i in range(40)]
    source = Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=2)
    return PackedStream(source, train_tokenizer(texts, vocab_size=300), length=length, shuffle_buffer=6, seed=3)


def trained(trainer: Any) -> Any:
    """Train, and return the trainer."""
    trainer.train()
    return trainer


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module, atol: float = 0.0) -> None:
    """Check that two models have the same weights, bit for bit unless a tolerance is given."""
    for (name, weight), same in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, same, rtol=0, atol=atol, msg=name)


def losses_of(run: Any, key: str = "loss") -> list[float]:
    """The losses that a trainer has logged, or other numbers, in order."""
    return [entry[key] for entry in run.state.log_history if key in entry]


def save_recipe(folder: Path, **changes: Any) -> Path:
    """The recipe of a run over forty small documents in text.jsonl, in the same folder."""
    rows = [{"text": SENTENCES[i % 3] * 3 + f"Number {i}."} for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = {"dataset": str(folder / "text.jsonl"), "vocab_size": 300, "block_size": 4, "model_length": 32}
    fields |= {"hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8, "dropout": 0.0, "max_steps": 3}
    fields |= {"per_device_train_batch_size": 4, "learning_rate": 0.01, "warmup_steps": 0, "logging_steps": 1}
    fields |= {"eval_strategy": "no", "final_estimator": "exact", "max_eval_samples": 4, "save_strategy": "no"}
    fields |= {"sample_prompt": "A block", "sample_tokens": 6, "disable_tqdm": True}
    known = {name: value for name, value in {**fields, **changes}.items() if value is not None}
    (folder / "tiny.yaml").write_text(json.dumps(known), encoding="utf-8")  # JSON is YAML
    return folder / "tiny.yaml"
