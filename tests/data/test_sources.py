import pytest

from bd3lm_hf.data.documents import load_text
from bd3lm_hf.data.sources import DATASETS, DETOKENIZERS, find_spec


NAMES = sorted({row.name for row in DATASETS.values()})


def test_the_table_has_every_published_data_set() -> None:
    assert {
        "python-docs", "python-source", "openwebtext", "lm1b", "text8", "wikitext2", "wikitext103", "ptb", "lambada",
        "ag_news", "scientific_papers_arxiv", "scientific_papers_pubmed",
    } == set(NAMES)  # fmt: skip
    assert all(row.detokenizer is None or row.detokenizer in DETOKENIZERS for row in DATASETS.values())
    assert find_spec("OWT").name == find_spec("openwebtext-split").name == "openwebtext"
    assert find_spec("scientific-papers_arxiv").name == find_spec("arxiv").name == "scientific_papers_arxiv"


def test_an_unknown_name_suggests_the_nearest_and_says_how_the_hub_is_named() -> None:
    with pytest.raises(ValueError, match=r"'wikitex2'\. Did you mean 'wikitext2'\?.*owner/name and needs network"):
        load_text("wikitex2")
    with pytest.raises(ValueError, match=r"'qqq'\. There are: python-docs, python-source, openwebtext"):
        load_text("qqq")


@pytest.mark.parametrize("path", ["./missing", "missing.txt", "/no/such/folder", "~/missing.jsonl"])
def test_a_missing_file_is_called_a_missing_file(path: str) -> None:
    with pytest.raises(ValueError, match="There is no file or folder '.*missing.*|There is no file or folder '/no/"):
        load_text(path)
    with pytest.raises(ValueError, match="to read 'lm1b' from; check the path"):
        load_text("lm1b", source=path)
