"""Words that this project does not use, in code and documents; the rules are in CONTRIBUTING.md."""

import re
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
WORDS = {
    r"\bcan not\b": "cannot",
    r"\banew\b": "again",
    r"\bbe had\b": "be loaded, be downloaded",
    r"\bdoes not do\b": "the condition that is not met",
    r"\bgives way\b": "the rule that wins",
    r"\bwhoever\b": "a person or program",
    r"\bthereby\b": "nothing",
    r"\bdata sets?\b": "dataset",
    r"\bis none of a\b": "is not a",
}


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split() if name != "tests/test_prose.py"]


def test_no_file_uses_a_word_that_we_replaced():
    found = [
        f"{path.relative_to(ROOT)}:{number}: write {better!r} for {match[0]!r}"
        for path in files()
        if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word, better in WORDS.items()
        for match in re.finditer(word, line, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


def test_docstrings_begin_with_a_verb_and_not_with_a_question_word():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:60]}"
        for path in files()
        if path.suffix == ".py" and path.is_file() and "tests" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.match(r'\s*"""(What|Where|Of|Whose|Who|How) ', line)
    ]
    assert not found, "\n".join(found)
