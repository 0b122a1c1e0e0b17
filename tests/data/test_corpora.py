import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bd3lm_hf.data import corpora
from bd3lm_hf.data.corpora import Document, python_docs, python_source


@pytest.fixture(scope="module")
def docs() -> list[Document]:
    return python_docs()


@pytest.fixture(scope="module")
def sources() -> list[Document]:
    return python_source()


def test_the_documentation_is_two_megabytes_of_english_in_hundreds_of_documents(docs: list[Document]) -> None:
    assert len(docs) >= 500
    assert 1_500_000 < sum(len(document.text) for document in docs) < 5_000_000
    text = " ".join(document.text for document in docs).lower()
    assert text.count(" the ") > 10_000


def test_names_are_distinct_texts_are_not_empty_and_nothing_depends_on_the_place_of_python(docs, sources) -> None:
    for documents in (docs, sources):
        assert len({document.name for document in documents}) == len(documents)
        assert all(document.text.strip() for document in documents)
        assert not any(sysconfig.get_path("stdlib") in document.name for document in documents)
    assert not any("_sysconfigdata" in document.name for document in sources)


def test_the_documentation_has_topics_modules_and_signatures(docs: list[Document]) -> None:
    texts = {document.name: document.text for document in docs}
    assert "assert" in texts["topic/assert"]
    assert texts["module/textwrap"].startswith("textwrap\n\nText wrapping and filling.")
    assert "textwrap.dedent(text)\n\nRemove any common leading whitespace" in texts["module/textwrap"]
    assert "textwrap.TextWrapper.wrap(self, text)" in texts["module/textwrap"]
    parts = {part for name in texts for part in name.replace("/", ".").split(".")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages"})


def test_the_sources_are_python_files_and_larger_than_the_documentation(docs, sources) -> None:
    texts = {document.name: document.text for document in sources}
    assert "def dedent(text):" in texts["textwrap.py"]
    assert all(name.endswith(".py") for name in texts)
    assert sum(map(len, texts.values())) > 3 * sum(len(document.text) for document in docs)


def test_another_process_finds_the_same_documents_and_imports_none_of_the_modules(docs: list[Document]) -> None:
    code = (
        "import hashlib, sys; from bd3lm_hf.data.corpora import python_docs;"
        "print(hashlib.sha256(repr(python_docs()).encode()).hexdigest(), {'turtle', 'this'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert printed.split() == [hashlib.sha256(repr(docs).encode()).hexdigest(), "set()"]


def test_a_python_without_source_files_or_topics_says_what_to_do(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="source files"):
        python_source()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="pydoc_data.topics.*python-docs"):
        python_docs()
