"""What a stranger's machine does with a folder: load by every Auto class, compute, write text. Without bd3lm_hf.

Run as a script by `check.py` in an isolated process: `python -I alone.py FOLDER PROBE THREADS`. The probe holds inputs
and what the model in memory made of them.
"""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


NEW_TOKENS = 4


class _Absent(MetaPathFinder):
    """Has `bd3lm_hf` not be there, also where it is installed beside transformers."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse the package; of other modules this finder knows nothing."""
        if name.partition(".")[0] == "bd3lm_hf":
            raise ImportError(f"{name} is not installed here")


def forget_bd3lm_hf() -> None:
    """Make sure that bd3lm_hf can not be imported.

    Raises:
        RuntimeError: it can.
    """
    sys.meta_path.insert(0, _Absent())
    try:
        import bd3lm_hf
    except ImportError:
        return
    raise RuntimeError(f"bd3lm_hf was imported here already, from {bd3lm_hf.__file__}: this shows nothing.")


def outputs(model: Any, inputs: dict[str, torch.Tensor], prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model makes of inputs: `first`, its first output, and `text`, the prompt that it continues, if it can.

    The weights move to memory that torch aligns: kernels may round differently for those of a mapped file.
    """
    model = model.eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        found = {"first": model(**inputs)[0]}
        if model.can_generate():
            torch.manual_seed(0)
            found["text"] = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return found


def check(folder: str, probe: dict[str, torch.Tensor], code: str = "transformers_modules") -> None:
    """Compare what every Auto class loads from a folder with the probe, bit for bit; then write through the pipeline.

    Args:
        code: the package that the classes must come from: what transformers makes of the files of a folder.

    Raises:
        RuntimeError: something is missing or differs; other errors come from transformers as they are.
    """
    inputs = {name.removeprefix("inputs."): t for name, t in probe.items() if name.startswith("inputs.")}
    for auto_class in sorted({name.split(".")[1] for name in probe if name.startswith("expected.")}):
        loaded: Any = getattr(transformers, auto_class).from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        model, info = loaded
        # A backbone does not use the head's weights.
        if info["missing_keys"] or info["mismatched_keys"]:
            raise RuntimeError(f"{auto_class} finds no weights for {sorted(map(str, info['missing_keys']))[:8]}")
        if not type(model).__module__.startswith(f"{code}."):
            raise RuntimeError(f"{auto_class} makes a {type(model).__name__} of other code than the folder's")
        for name, tensor in outputs(model, inputs, probe["prompt"]).items():
            if not torch.equal(tensor, probe[f"expected.{auto_class}.{name}"]):
                raise RuntimeError(f"{auto_class} computes something else than the model that was saved ({name})")
    if any(Path(folder).glob("tokenizer*")):
        words = transformers.AutoTokenizer.from_pretrained(folder)
        source = model if (Path(folder) / "adapter_config.json").is_file() else folder
        write: Any = transformers.pipeline("text-generation", model=source, tokenizer=words, trust_remote_code=True)
        written = write("A", max_new_tokens=NEW_TOKENS)[0]["generated_text"]
        if not isinstance(written, str):
            raise RuntimeError(f"the pipeline writes {written!r}")


if __name__ == "__main__":
    forget_bd3lm_hf()
    torch.set_num_threads(int(sys.argv[3]))
    check(sys.argv[1], load_file(sys.argv[2]))
