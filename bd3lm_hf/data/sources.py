"""Tables of the paper's datasets: detokenizers, sources and evaluation suites (arXiv 2503.09573, Sec. 6, App. C).

Detokenizers undo the tokenization that some evaluation corpora were published with (App. C.2). Each is a table of
replacements (`str.replace` for a string, `sub` for a compiled pattern), applied from top to bottom. The order matters:
a rule sees the result of earlier rules.

End tokens after documents and special tokens around sequences change perplexity by several percent, so these flags are
as much a part of a published number as its dataset.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


Rule = tuple[str | re.Pattern[str], str]


def _spaced_marks(marks: str) -> tuple[Rule, ...]:
    """`a , b` -> `a, b` for every mark."""
    return tuple((f" {mark} ", f"{mark} ") for mark in marks)


def _trimmed_pairs(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    """`( a )` -> `(a)`: no whitespace inside a pair of delimiters."""
    return tuple(
        (re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"), rf"{left}\1{right}")
        for left, right in pairs
    )


def _single_spaced_pairs(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    """`( a )` -> `(a)`: exactly one space on each side, and no delimiter of the pair in between."""
    return tuple(
        (
            re.compile(rf"{re.escape(left)} ([^{re.escape(left)}{re.escape(right)}]+) {re.escape(right)}"),
            rf"{left}\1{right}",
        )
        for left, right in pairs
    )


WIKITEXT: tuple[Rule, ...] = (
    ("s '", "s'"),
    # numbers and hyphens
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *_spaced_marks(":;.!?,"),
    *_trimmed_pairs(("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")),
    # headings
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)

PENN_TREEBANK: tuple[Rule, ...] = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    # Neighbours share a space, so one pass leaves every second N; the published code makes ten passes.
    *((" N ", " 1 "),) * 10,
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

LM1B: tuple[Rule, ...] = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *_spaced_marks(",:;"),
    (" / ", "/"),
    *_single_spaced_pairs(('"', '"'), ("'", "'"), ("(", ")"), ("[", "]")),
    ("$ ", "$"),
    ("£ ", "£"),
)

LAMBADA: tuple[Rule, ...] = (
    ("“", '"'),
    ("”", '"'),
    (re.compile(r"\s+\Z"), ""),
    (re.compile(r"\A\s*"), "\n"),
)

#: All detokenizers by name. Scientific papers pass through two tables, one after the other.
DETOKENIZERS: dict[str, tuple[Rule, ...]] = {
    "wikitext": WIKITEXT,
    "ptb": PENN_TREEBANK,
    "lm1b": LM1B,
    "lambada": LAMBADA,
    "scientific_papers": WIKITEXT + LM1B,
}


def detokenizer(name: str) -> Callable[[str], str]:
    """Return the function that detokenizes one text of the corpus `name`, a key of `DETOKENIZERS`.

    Raises:
        ValueError: if there is no detokenizer of that name.
    """
    if name not in DETOKENIZERS:
        raise ValueError(f"No detokenizer is called {name!r}; there are: {', '.join(DETOKENIZERS)}.")
    rules = DETOKENIZERS[name]

    def detokenize(text: str) -> str:
        for old, new in rules:
            text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
        return text

    return detokenize


DEFAULT_DATASET = "python-docs"  # of a training run; embedded, so nothing is downloaded
SPLITS = ("train", "validation", "test")

# Datasets


#: The branch with the hub's parquet conversion of datasets that have a loading script.
_CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True)
class DatasetSpec:
    """One source of text."""

    name: str  # what users type; the aliases work too
    path: str | None = None  # hub repository; None for the embedded corpora
    config: str | None = None  # configuration of the repository
    data_dir: str | None = None  # folder of the repository to read
    revision: str | None = None  # branch or commit of the repository
    text_column: str | None = None  # None looks for "text", then for the only column of strings
    # Our split -> the source's. If empty, splits are found by their names, and missing ones are held out.
    splits: Mapping[str, str] = field(default_factory=dict)
    tail: int = 0  # documents at the end of the training split that form the validation split instead
    documents: int | None = None  # number of documents in the training split, needed to stream it without the tail
    chunk: int = 0  # cut documents into pieces of this many characters; 0 leaves them whole
    detokenizer: str | None = None  # a key of `DETOKENIZERS`
    aliases: tuple[str, ...] = ()
    note: str = ""  # what to do when the source cannot be read; part of the error message

    def __post_init__(self) -> None:
        if self.detokenizer is not None:
            detokenizer(self.detokenizer)  # refuses an unknown name


_OWN_SPLITS = {split: split for split in SPLITS}
_TRAIN_TEST = {"train": "train", "validation": "test", "test": "test"}

_SCRIPT_NOTE = (
    "This dataset has a loading script, which the datasets library no longer runs, so the hub's parquet conversion of "
    "it is read. If that is gone, download a parquet copy with the same columns and pass its folder as the source."
)

_ROWS = (
    DatasetSpec("python-docs", aliases=("demo",)),
    DatasetSpec("python-source"),
    DatasetSpec(
        "openwebtext",
        path="Skylion007/openwebtext",
        data_dir="plain_text",
        revision=_CONVERTED,
        text_column="text",
        splits={"train": "train", "validation": "train"},
        tail=100_000,
        documents=8_013_769,
        aliases=("owt", "openwebtext-split", "openwebtext-streaming"),
        note=_SCRIPT_NOTE + " The conversion must hold all 8,013,769 documents: the last 100,000 are held out.",
    ),
    DatasetSpec(
        "lm1b",
        path="billion-word-benchmark/lm1b",
        data_dir="plain_text",
        revision=_CONVERTED,
        text_column="text",
        splits=_TRAIN_TEST,
        detokenizer="lm1b",
        aliases=("lm1b-wrap", "lm1b-gpt2"),
        note=_SCRIPT_NOTE,
    ),
    DatasetSpec(
        "text8",
        path="afmck/text8",
        text_column="text",
        chunk=256,
        note=(
            "The one text is cut into 90 M, 5 M and 5 M characters unless the source has splits, and these into "
            "pieces of 256. Any copy of the file text8 will do: pass it, named text8.txt, as the source."
        ),
    ),
    *(
        DatasetSpec(
            f"wikitext{size}",
            path="Salesforce/wikitext",
            config=f"wikitext-{size}-raw-v1",
            text_column="text",
            splits=_OWN_SPLITS,
            detokenizer="wikitext",
            aliases=(f"wikitext-{size}",),
        )
        for size in (2, 103)
    ),
    DatasetSpec(
        "ptb",
        path="ptb-text-only/ptb_text_only",
        data_dir="penn_treebank",
        revision=_CONVERTED,
        text_column="sentence",
        splits=_OWN_SPLITS,
        detokenizer="ptb",
        aliases=("penn-treebank",),
        note=_SCRIPT_NOTE,
    ),
    DatasetSpec(
        "lambada",
        path="EleutherAI/lambada_openai",
        config="default",
        text_column="text",
        splits={"validation": "test", "test": "test"},
        detokenizer="lambada",
        aliases=("lambada-openai",),
        note="OpenAI's file lambada_test.jsonl has the same texts: download it and pass it as the source.",
    ),
    DatasetSpec("ag_news", path="fancyzhx/ag_news", text_column="text", splits=_TRAIN_TEST),
    *(
        DatasetSpec(
            f"scientific_papers_{part}",
            path="armanc/scientific_papers",
            data_dir=part,
            revision=_CONVERTED,
            text_column="article",
            splits=_OWN_SPLITS,
            detokenizer="scientific_papers",
            aliases=(part,),
            note=_SCRIPT_NOTE + f" Its articles are also in the column 'article' of ccdv/{part}-summarization.",
        )
        for part in ("arxiv", "pubmed")
    ),
)

#: Ending of a data file -> its kind. The ending of a compression may follow.
ENDINGS = {
    ".txt": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "lzma"}


def exists(path: str) -> bool:
    """Return whether the path is a file or folder on this machine."""
    return Path(path).expanduser().exists()


def data_ending(path: str | Path) -> str:
    """Return the ending of a file name, in lower case and without that of a compression."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def looks_like_path(name: str) -> bool:
    """Return whether the name can only mean a local file or folder."""
    return name.startswith((".", "/", "~", "\\")) or data_ending(name) in ENDINGS or name.count("/") > 1


def is_local(name: str) -> bool:
    """Return whether the name refers to something on this machine, which nobody else can load."""
    return exists(name) or looks_like_path(name)


def normal(name: str) -> str:
    """Normalize the name of a dataset, to compare names."""
    return name.lower().replace("_", "-")


#: Every dataset by each of its names, in lower case with hyphens.
DATASETS: dict[str, DatasetSpec] = {normal(name): row for row in _ROWS for name in (row.name, *row.aliases)}


def find_spec(name_or_path: str) -> DatasetSpec:
    """Return the table's row with that name, or a new row for the hub repository `owner/name`.

    Raises:
        ValueError: if the name is neither.
    """
    row = DATASETS.get(normal(name_or_path))
    if row is not None:
        return row
    if looks_like_path(name_or_path):
        raise ValueError(f"There is no file or folder {name_or_path!r}; check the path.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path):
        return DatasetSpec(name_or_path, path=name_or_path)
    # Suggest the nearest name for a typo.
    near = difflib.get_close_matches(normal(name_or_path), DATASETS, n=1, cutoff=0.5)
    guess = f" Did you mean {DATASETS[near[0]].name!r}?" if near else ""
    raise ValueError(
        f"No dataset, file or folder is called {name_or_path!r}.{guess} Known names: "
        f"{', '.join(row.name for row in _ROWS)}. A dataset of the hub is written owner/name and needs a "
        "network connection."
    )


# Evaluations of the paper


PACKINGS = ("contiguous", "published")  # see `packing.py`


class Flags(NamedTuple):
    """Flags of an evaluation: the split, and how its text becomes sequences."""

    split: str = "validation"
    packing: str = "published"
    insert_eos: bool = True  # after every document
    insert_special: bool = True  # begin and end token around every sequence


class Suite(NamedTuple):
    """Datasets that are scored together."""

    length: int  # tokens of a sequence in the paper
    sets: Mapping[str, Flags]


#: In-domain evaluations by dataset; all others have the published defaults, those of `Flags`.
PUBLISHED: Mapping[str, Flags] = {"openwebtext": Flags(insert_special=False), "lm1b": Flags(split="test")}

_ZERO_SHOT, _ZERO_SHOT_TEST = Flags(insert_eos=False), Flags(split="test", insert_eos=False)

#: By name. Zero-shot is Table 5, in the order of its columns: the models were trained on none of them.
SUITES: Mapping[str, Suite] = {
    "zero-shot": Suite(
        1024,
        {
            "ptb": _ZERO_SHOT,
            "wikitext2": _ZERO_SHOT,
            "wikitext103": _ZERO_SHOT,
            "lm1b": _ZERO_SHOT_TEST,
            "lambada": _ZERO_SHOT_TEST,
            "ag_news": _ZERO_SHOT_TEST,
            "scientific_papers_pubmed": _ZERO_SHOT,
            "scientific_papers_arxiv": _ZERO_SHOT,
        },
    ),
}
