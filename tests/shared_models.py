"""The tiny network of all tests and its weights, and folders as training leaves them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bd3lm_hf import ARConfig, BD3LMConfig, MDLMConfig, SEDDConfig, SSDLMConfig, SSDLMForMaskedLM
from bd3lm_hf.modeling.modeling_ar import ARForCausalLM
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.modeling_mdlm import MDLMForMaskedLM
from bd3lm_hf.modeling.modeling_sedd import SEDDForMaskedLM


#: Two layers, two heads, blocks of 4 in a window of 32, 48 ids, of which the mask is the last; no dropout.
TINY = {"vocab_size": 48, "block_size": 4, "model_length": 32, "hidden_dim": 32, "cond_dim": 16, "n_blocks": 2}
TINY |= {"n_heads": 2, "dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # type: ignore[dict-item]

#: The models on our network, with their configurations.
CLASSES: dict[str, tuple[Any, Any]] = {
    "bd3lm": (BD3LMForMaskedLM, BD3LMConfig),
    "ar": (ARForCausalLM, ARConfig),
    "mdlm": (MDLMForMaskedLM, MDLMConfig),
    "sedd": (SEDDForMaskedLM, SEDDConfig),
}

SCORE = {"nll": 2.5, "perplexity": 12.182, "bits_per_token": 3.6, "bits_per_byte": 1.25, "standard_error": 0.01}
SCORE |= {"num_tokens": 1234, "num_sequences": 40, "seconds": 1.0}
JUNK = (".env", "optimizer.pt", "training_args.bin", "samples.txt", "notes.py", "runs/events.out", "ema.json")


def randomized(model: torch.nn.Module, seed: int = 0, std: float = 0.1) -> Any:
    """Fill every parameter with seeded normal numbers, around 1 where they scale a norm, and return the model.

    A fresh model has a zero head and zero adaLN, hence uniform logits that no test can learn anything from; a norm
    that is scaled by numbers around 0 would hide everything that feeds it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + ("norm" in name))
    return model


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The fields of a configuration that name the special tokens of a tokenizer."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")}


def tiny_bd3lm(std: float = 0.1, **fields: Any) -> Any:
    """A `BD3LMForMaskedLM` of `TINY` and other fields in evaluation mode, with informative seeded weights."""
    return randomized(BD3LMForMaskedLM(BD3LMConfig(**{**TINY, **fields})), std=std).eval()


def tiny_ssdlm(**fields: Any) -> Any:
    """An SSD-LM of one layer in evaluation mode, which writes in two steps a block."""
    sizes = {"vocab_size": 48, "hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "block_size": 4, "model_length": 16}
    model = SSDLMForMaskedLM(SSDLMConfig(**{**sizes, **fields})).eval()
    model.generation_config.num_denoising_steps = 2
    return model


def tiny_gpt2() -> GPT2LMHeadModel:
    """A causal model of transformers' own, whose vocabulary is as large as that of the tiny tokenizer."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=8, n_layer=1, n_head=1)).eval()


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


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
    from bd3lm_hf.checkpoints import add_adapters  # peft takes seconds to import

    adapted = add_adapters(BD3LMForMaskedLM.from_pretrained(base), rank=2)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=generator)
    adapted.save_pretrained(folder)
    for path in base.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder
