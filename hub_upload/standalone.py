"""Load a folder without bd3lm_hf, as on somebody else's machine: by every Auto class, compute, generate.

Run as a script by `load_check.py` in an isolated process: `python -I standalone.py FOLDER PROBE THREADS`. The probe
holds inputs and the outputs of the model in memory.
"""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


NEW_TOKENS = 4


class _BlockPackage(MetaPathFinder):
    """Make `bd3lm_hf` look absent, even if it is installed next to transformers."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse the package, and leave all other modules to the finders that follow."""
        if name.partition(".")[0] == "bd3lm_hf":
            raise ImportError(f"{name} is not installed here")


def block_bd3lm_hf() -> None:
    """Make sure that bd3lm_hf cannot be imported.

    Raises:
        RuntimeError: if it was imported before.
    """
    sys.meta_path.insert(0, _BlockPackage())
    try:
        import bd3lm_hf
    except ImportError:
        return
    raise RuntimeError(f"bd3lm_hf was imported here already, from {bd3lm_hf.__file__}: the check would prove nothing.")


def model_outputs(model: Any, inputs: dict[str, torch.Tensor], prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a model's `first` output and, if it can generate, `text`: the prompt with a greedy continuation."""
    model = model.eval()
    with torch.no_grad():
        # Copied to memory that torch aligns: kernels may round differently on the weights of a mapped file.
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
                raise RuntimeError(f"{auto_class} computes something else than the model that was saved ({name})")
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
