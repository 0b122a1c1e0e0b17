"""Does a folder load by itself? Asked of a process that knows nothing of bd3lm_hf, before anything is uploaded."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from peft import PeftModel
from safetensors.torch import save_file

from bd3lm_hf.hub_upload import standalone
from bd3lm_hf.hub_upload.errors import CheckError, without_token
from bd3lm_hf.hub_upload.standalone import outputs


def check_alone(folder: Path, model: Any) -> None:
    """Load a folder in an isolated process, by each Auto class, and compare with the model that it was made of.

    Outputs and greedy text must be equal bit for bit; then the text-generation pipeline writes. The process finds no
    module of this checkout or environment variable, no login, no cache of code, and no network.

    Args:
        model: in memory; a `PeftModel` for the folder of an adapter.

    Raises:
        CheckError: it does not load, or computes something else.
    """
    with tempfile.TemporaryDirectory(prefix="bd3lm-check-", ignore_cleanup_errors=True) as place:
        probe = Path(place) / "probe.safetensors"
        save_file(make_probe(model), probe)
        command = [sys.executable, "-I", standalone.__file__, str(folder.resolve()), str(probe)]
        result = subprocess.run(
            [*command, str(torch.get_num_threads())],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            cwd=place,
            env=_environment(place),
        )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = without_token(lines[-1]) if lines else f"exit code {result.returncode}"
        raise CheckError(f"the folder does not load by itself, so nothing is uploaded: {reason}")


def _environment(place: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if "TOKEN" not in name and not name.startswith("HF_")}
    own = {"HF_HOME": place, "HF_MODULES_CACHE": str(Path(place) / "modules"), "HF_HUB_OFFLINE": "1"}
    # The base of an adapter was downloaded a moment ago.
    return kept | own | {"HF_HUB_CACHE": HF_HUB_CACHE, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUTF8": "1"}


def make_probe(model: Any) -> dict[str, torch.Tensor]:
    """Inputs, and what each Auto class's part of a model makes of them, by names that `alone.check` reads."""
    adapted = isinstance(model, PeftModel)
    whole = model.get_base_model() if adapted else model
    inputs, prompt = whole.dummy_inputs, make_prompt(whole.config)
    probe = {f"inputs.{name}": tensor for name, tensor in inputs.items()} | {"prompt": prompt}
    for name, cls in whole.auto_classes.items():
        # An adapter is loaded as it was trained: with a head.
        part = model if type(whole) is cls else None if adapted else whole.base_model
        if isinstance(part, (cls, PeftModel)):
            probe |= {f"expected.{name}.{key}": t.contiguous() for key, t in outputs(part, inputs, prompt).items()}
    return probe


def make_prompt(config: Any) -> torch.Tensor:
    """Two seeded rows of ids, a block long, without special tokens: what a model may continue."""
    special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "mask")}
    text = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    length = max(1, min(config.block_size, config.max_position_embeddings // 2))
    return text[torch.randint(0, len(text), (2, length), generator=torch.Generator().manual_seed(0))]


__all__ = ["check_alone", "make_probe", "make_prompt"]
