"""Folders as training leaves them, for the tests of uploads."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from bd3lm_hf import BD3LMForMaskedLM
from bd3lm_hf.checkpoints import add_adapters


SCORE = {
    "nll": 2.5,
    "perplexity": 12.182,
    "bits_per_token": 3.6,
    "bits_per_byte": 1.25,
    "standard_error": 0.01,
    "num_tokens": 1234,
    "num_sequences": 40,
    "seconds": 1.0,
}
JUNK = (".env", "optimizer.pt", "training_args.bin", "samples.txt", "notes.py", "runs/events.out", "ema.json")


def add_run(folder: Path, **recipe: Any) -> Path:
    """Add the files of a run to a model: recipe, results, weights.json, and files that must never be uploaded."""
    fields = {"dataset": "wikitext103", "learning_rate": 0.001, "ema_decay": 0.99, "final_estimator": "exact"}
    (folder / "recipe.yaml").write_text(json.dumps({**fields, "output_dir": "secret-place", **recipe}))
    results = {"before": None, "after": SCORE, "steps": 7, "seed": 3, "versions": {"torch": "2.13"}}
    (folder / "results.json").write_text(json.dumps({**results, "unigram_perplexity": 99.5}))
    (folder / "weights.json").write_text(json.dumps({"weights": "average", "step": 7, "ema_decay": 0.99}))
    for name in JUNK:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("HF_TOKEN=hf_secret")
    return folder


def make_adapter(base: Path, folder: Path) -> Path:
    """Save an adapter that changes something, on the model of a folder, with the same tokenizer."""
    adapted = add_adapters(BD3LMForMaskedLM.from_pretrained(base), rank=2)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=generator)
    adapted.save_pretrained(folder)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder
