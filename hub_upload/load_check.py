"""Check that a folder loads without bd3lm_hf, as on somebody else's machine, before it is uploaded.

`check_loads_alone` runs this file as a script in an isolated process: `python -I load_check.py FOLDER PROBE THREADS`.
It loads the folder with every Auto class, runs the model, and generates. The probe contains the inputs, and the
outputs of the model in memory.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from peft import PeftModel
from safetensors.torch import load_file, save_file


NEW_TOKENS = 4


class CheckError(RuntimeError):
    """A folder does not load without bd3lm_hf as the model that it was saved from."""

    exit_code = 1  # the arguments were valid


def check_loads_alone(folder: Path, model: Any) -> None:
    """Load a folder in an isolated process with each Auto class, and compare with the model that was saved.

    Outputs and greedy text must be equal bit for bit; then the text-generation pipeline runs. The process has no
    modules of this checkout, no Python environment variables, no login, no cached code and no network.

    Args:
        model: in memory; a `PeftModel` for the folder of an adapter.

    Raises:
        CheckError: if the folder does not load, or its outputs differ.
    """
    with tempfile.TemporaryDirectory(prefix="bd3lm-check-", ignore_cleanup_errors=True) as home:
        probe = Path(home) / "probe.safetensors"
        save_file(make_probe(model), probe)
        command = [sys.executable, "-I", __file__, str(folder.resolve()), str(probe)]
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
        from bd3lm_hf.console import one_line  # not at the top: the isolated process imports this file

        reason = one_line(lines[-1]) if lines else f"exit code {result.returncode}"
        raise CheckError(f"The folder does not load without bd3lm_hf, so nothing was uploaded: {reason}")


def isolated_environment(home: str) -> dict[str, str]:
    """Return the environment of the check: no token, no settings of the Hub client, caches in `home`."""
    kept = {name: value for name, value in os.environ.items() if "TOKEN" not in name and not name.startswith("HF_")}
    own = {"HF_HOME": home, "HF_MODULES_CACHE": str(Path(home) / "modules"), "HF_HUB_OFFLINE": "1"}
    # The base of an adapter was just downloaded to this cache.
    return kept | own | {"HF_HUB_CACHE": HF_HUB_CACHE, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUTF8": "1"}


def make_probe(model: Any) -> dict[str, torch.Tensor]:
    """Return inputs, and the expected outputs for each Auto class, under the names that [`check`] reads."""
    is_adapter = isinstance(model, PeftModel)
    whole = model.get_base_model() if is_adapter else model
    inputs, prompt = whole.dummy_inputs, make_prompt(whole.config)
    if hasattr(whole, "infill"):
        inputs["input_ids"][:, -1] = whole.config.mask_token_id  # else it warns that there is nothing to denoise
    probe = {f"inputs.{name}": tensor for name, tensor in inputs.items()} | {"prompt": prompt}
    for name, cls in whole.auto_classes.items():
        # An adapter was trained with a head, so only classes with a head load it.
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


# In the isolated process


def block_bd3lm_hf() -> None:
    """Make bd3lm_hf look absent, even if it is installed next to transformers.

    Raises:
        RuntimeError: if it was imported before.
    """
    if (imported := sys.modules.get("bd3lm_hf")) is not None:
        raise RuntimeError(
            f"bd3lm_hf was imported here already, from {imported.__file__}: the check would prove nothing."
        )
    sys.modules["bd3lm_hf"] = None  # type: ignore[assignment]  # Python's own marker of a missing package


def model_outputs(model: Any, inputs: dict[str, torch.Tensor], prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a model's `first` output and, if it can generate, `text`: the prompt with a greedy continuation."""
    model = model.eval()
    with torch.no_grad():
        # Copied to memory that torch aligns: kernels may round differently on weights in a memory-mapped file.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        outputs = {"first": model(**inputs)[0]}
        if model.can_generate():
            torch.manual_seed(0)
            outputs["text"] = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return outputs


def check(folder: str, probe: dict[str, torch.Tensor], code: str = "transformers_modules") -> None:
    """Compare every Auto class with the probe, bit for bit; then generate with the pipeline.

    Args:
        code: package that the classes must come from; by default transformers' copy of the folder's code.

    Raises:
        RuntimeError: if weights are missing or an output differs; other errors come from transformers.
    """
    inputs = {name.removeprefix("inputs."): t for name, t in probe.items() if name.startswith("inputs.")}
    for auto_class in sorted({name.split(".")[1] for name in probe if name.startswith("expected.")}):
        loaded: Any = getattr(transformers, auto_class).from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        model, info = loaded
        # Unexpected weights are fine: a backbone does not use the head's.
        if info["missing_keys"] or info["mismatched_keys"]:
            raise RuntimeError(f"{auto_class} finds no weights for {sorted(map(str, info['missing_keys']))[:8]}")
        if not type(model).__module__.startswith(f"{code}."):
            raise RuntimeError(f"{auto_class} loads {type(model).__name__} from code that is not in the folder")
        for name, tensor in model_outputs(model, inputs, probe["prompt"]).items():
            if not torch.equal(tensor, probe[f"expected.{auto_class}.{name}"]):
                raise RuntimeError(f"{auto_class} computes other outputs than the saved model ({name})")
    if any(Path(folder).glob("tokenizer*")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        source = model if (Path(folder) / "adapter_config.json").is_file() else folder
        pipe: Any = transformers.pipeline("text-generation", model=source, tokenizer=tokenizer, trust_remote_code=True)
        text = pipe("A", max_new_tokens=NEW_TOKENS)[0]["generated_text"]
        if not isinstance(text, str):
            raise RuntimeError(f"the text-generation pipeline returns {text!r}")


if __name__ == "__main__":
    block_bd3lm_hf()
    torch.set_num_threads(int(sys.argv[3]))
    check(sys.argv[1], load_file(sys.argv[2]))
