"""The Python blocks of README and docs run as written, with tiny models and texts in place of the named ones."""

import re
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [path for path in DOCUMENTS if "```python" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_python_blocks_of_a_document_run(path, model_folder, gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_book.txt").write_text("\n".join(f"Line {i} is about {i * i} things." for i in range(1000)))
    named = {"bd3lm-demo": model_folder, "Qwen/Qwen3-0.6B": gpt2_folder, "max_steps=200": "max_steps=2"}
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {"ids": torch.arange(4, 12)[None]}
    for block in blocks:
        for name, value in named.items():
            block = block.replace(name, str(value))
        exec(block, names)
    assert torch.isfinite(names["loss"])  # the last lines of each document compute a loss
