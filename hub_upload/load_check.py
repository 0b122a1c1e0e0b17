"""Check that a folder loads without bd3lm_hf, in a process that cannot import the package, before it is uploaded."""

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

from bd3lm_hf.argument_parser import one_line
from bd3lm_hf.hub_upload import standalone
from bd3lm_hf.hub_upload.errors import CheckError
from bd3lm_hf.hub_upload.standalone import model_outputs


def check_loads_alone(folder: Path, model: Any) -> None:
    """Load a folder in an isolated process with each Auto class, and compare with the model that was saved.

    Outputs and greedy text must be equal bit for bit; then the text-generation pipeline runs. The process has no
    module of this checkout, no Python variables of the environment, no login, no cached code and no network.

    Args:
        model: in memory; a `PeftModel` for the folder of an adapter.

    Raises:
        CheckError: if the folder does not load, or computes something else.
    """
    with tempfile.TemporaryDirectory(prefix="bd3lm-check-", ignore_cleanup_errors=True) as home:
        probe = Path(home) / "probe.safetensors"
        save_file(make_probe(model), probe)
        command = [sys.executable, "-I", standalone.__file__, str(folder.resolve()), str(probe)]
        result = subprocess.run(
            [*command, str(torch.get_num_threads())],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            cwd=home,
            env=isolated_environment(home),
        )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = one_line(lines[-1]) if lines else f"exit code {result.returncode}"
        raise CheckError(f"The folder does not load without bd3lm_hf, so nothing was uploaded: {reason}")


def isolated_environment(home: str) -> dict[str, str]:
    """Return the environment of the check: no token, no settings of the Hub's client, caches in `home`."""
    kept = {name: value for name, value in os.environ.items() if "TOKEN" not in name and not name.startswith("HF_")}
    own = {"HF_HOME": home, "HF_MODULES_CACHE": str(Path(home) / "modules"), "HF_HUB_OFFLINE": "1"}
    # The base of an adapter was downloaded to this cache just before.
    return kept | own | {"HF_HUB_CACHE": HF_HUB_CACHE, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUTF8": "1"}


def make_probe(model: Any) -> dict[str, torch.Tensor]:
    """Return inputs, and the expected outputs for each Auto class, under the names that `standalone.check` reads."""
    is_adapter = isinstance(model, PeftModel)
    whole = model.get_base_model() if is_adapter else model
    inputs, prompt = whole.dummy_inputs, make_prompt(whole.config)
    if hasattr(whole, "infill"):
        inputs["input_ids"][:, -1] = whole.config.mask_token_id  # else it warns that there is nothing to denoise
    probe = {f"inputs.{name}": tensor for name, tensor in inputs.items()} | {"prompt": prompt}
    for name, cls in whole.auto_classes.items():
        # An adapter was trained with a head, so it is only loaded by classes that have one.
        part = model if type(whole) is cls else None if is_adapter else whole.base_model
        if isinstance(part, (cls, PeftModel)):
            outputs = model_outputs(part, inputs, prompt)
            probe |= {f"expected.{name}.{key}": tensor.contiguous() for key, tensor in outputs.items()}
    return probe


def make_prompt(config: Any) -> torch.Tensor:
    """Return two seeded rows of ordinary token ids, at most a block long."""
    # Special tokens would end the text or be refused.
    ids = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "mask")]
    special = {token for given in ids for token in (given if isinstance(given, list) else [given])}
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    length = max(1, min(config.block_size, config.model_length // 2))
    return ordinary[torch.randint(0, len(ordinary), (2, length), generator=torch.Generator().manual_seed(0))]
