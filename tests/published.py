"""Weights and outputs that the published implementation of the baselines recorded."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


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


def recorded_noise(recorded: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    """The draws of a recorded case; the published t is low + (high - low) times the stratified draw."""
    uniform = recorded[f"{case}.u_t"]
    strata = torch.arange(len(uniform)).view(-1, 1)
    return {"block_noise": (uniform + strata) / len(uniform), "token_noise": recorded[f"{case}.u_move"]}
