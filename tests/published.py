"""Weights and outputs that the published implementation recorded, and its samplers in plain torch."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, SSDLMConfig, SSDLMForMaskedLM
from bd3lm_hf.modeling.decoding_state_bd3lm import EntropyStopCriteria


GOLDEN = Path(__file__).parent / "golden"


def load_recorded(folder: str) -> dict[str, torch.Tensor]:
    """Inputs and outputs of a golden folder."""
    return load_file(GOLDEN / folder / "tensors.safetensors")


def published(folder: str, model_class, config_class, **fields):
    """The published weights of a golden folder in a model of ours."""
    sizes = json.loads((GOLDEN / folder / "config.json").read_text())["constructor"]
    names = {"model_length": "length", "hidden_dim": "hidden_size"}
    names |= {name: name for name in ("vocab_size", "n_heads", "n_blocks", "cond_dim", "dropout", "mask_token_id")}
    config = config_class(**{ours: sizes[theirs] for ours, theirs in names.items()}, **fields)
    model = model_class(config).eval()
    weights = load_file(GOLDEN / folder / "weights.safetensors")
    model.load_state_dict({f"backbone.{name}": value for name, value in weights.items()})
    return model


def published_bd3lm(block_size: int, **fields) -> BD3LMForMaskedLM:
    """The published weights of block diffusion, which fit every block size, in a model of ours."""
    sizes = {"vocab_size": 97, "model_length": 32, "hidden_dim": 64, "cond_dim": 16, "n_blocks": 2, "n_heads": 4}
    model = BD3LMForMaskedLM(BD3LMConfig(**{"dropout": 0.0, **sizes, **fields, "block_size": block_size})).eval()
    weights = load_file(GOLDEN / "01_bd3lm" / "weights.safetensors")
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def published_ssdlm(**fields) -> SSDLMForMaskedLM:
    """The published encoder and simplex layers of SSD-LM, in blocks of 5 in a window of 20."""
    folder = GOLDEN / "11_ssdlm"
    encoder = {"model_type": "roberta", **json.loads((folder / "config.json").read_text())["constructor"]}
    model = SSDLMForMaskedLM(SSDLMConfig(encoder_config=encoder, block_size=5, model_length=20, **fields)).eval()
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model


def published_gpt2() -> GPT2LMHeadModel:
    """The judge of the recorded perplexities."""
    folder = GOLDEN / "08_gen_ppl"
    model = GPT2LMHeadModel(GPT2Config(**json.loads((folder / "config.json").read_text())["constructor"])).eval()
    model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    return model


def recorded_noise(recorded: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    """The draws of a recorded case; the published t is low + (high - low) times the stratified draw."""
    uniform = recorded[f"{case}.u_t"]
    strata = torch.arange(len(uniform)).view(-1, 1)
    return {"block_noise": (uniform + strata) / len(uniform), "token_noise": recorded[f"{case}.u_move"]}


def draw_published(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The published categorical draw `(...)`, an exponential race with one uniform number per entry."""
    return (weights / (1e-10 - (uniform + 1e-10).log())).argmax(dim=-1)


def published_length(input_ids: torch.Tensor, *, eos_token_id: int | None = None) -> torch.Tensor:
    """Tokens `(batch,)` that the published sampler keeps of each row `(batch, length)`, without padding.

    A degenerate row loses its last 256 tokens. Otherwise, with `eos_token_id`, it ends at its second end token.
    """
    batch, length = input_ids.shape
    kept = torch.full((batch,), length)
    if eos_token_id is not None:
        second = (input_ids == eos_token_id).cumsum(dim=1) >= 2
        kept -= (second.sum(dim=1) - 1).clamp(min=0)
    return torch.where(EntropyStopCriteria(4.0)(input_ids, None), length - 256, kept)
