"""The data sets (paper, App. C.1): one table of sources, and `load_text`, which reads a row of it, a file or the hub.

Every source becomes documents in one column, `text`, in up to three splits. `bd3lm_hf.packing` makes sequences of
them, `bd3lm_hf.files` reads local files.
"""

import difflib
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from bd3lm_hf.corpora import python_docs, python_source
from bd3lm_hf.detokenizers import DETOKENIZERS, detokenizer
from bd3lm_hf.files import exists, load_files, looks_like_path
from bd3lm_hf.holdout import held_out_score, hold_out, members
from bd3lm_hf.packing import TextSize, bytes_per_token, pack
from bd3lm_hf.streaming import PackedStream


__all__ = [
    "DATASETS",
    "DatasetSpec",
    "PackedStream",
    "TextSize",
    "bytes_per_token",
    "find_spec",
    "held_out_score",
    "load_text",
    "pack",
]

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
#: What sources call the three splits.
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
#: The branch that the hub keeps, in parquet, of data sets that were made by a script.
_CONVERTED = "refs/convert/parquet"
_EMBEDDED = {"python-docs": python_docs, "python-source": python_source}
#: Part of every cache key: raise it when the embedded documents or the hold-out change.
_VERSION = 1


@dataclass(frozen=True)
class DatasetSpec:
    """One source of text.

    Attributes:
        name: what users call it, besides the `aliases`.
        path: hub repository; None for the embedded corpora.
        config: configuration of the repository.
        data_dir: folder of the repository that is read.
        revision: branch or commit of the repository.
        text_column: where the text is; None looks for "text", then for the only column of strings.
        splits: our split -> the source's split; empty means that the source's own names are looked for, and that what
            is missing is held out of its training split.
        tail: documents at the end of the training split that are the validation split instead.
        documents: documents of the training split, which a stream with a `tail` must know beforehand.
        detokenizer: name of a table in `bd3lm_hf.detokenizers`.
        note: what to do when the source can not be read; part of the error message.
    """

    name: str
    path: str | None = None
    config: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    text_column: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    tail: int = 0
    documents: int | None = None
    detokenizer: str | None = None
    aliases: tuple[str, ...] = ()
    note: str = ""


_OWN_SPLITS = {split: split for split in SPLITS}
_TRAIN_TEST = {"train": "train", "validation": "test", "test": "test"}
_SCRIPT_NOTE = (
    "This data set was made by a script, which the datasets library no longer runs; the hub's parquet conversion of "
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
        note=(
            "The one text is cut into 90 M, 5 M and 5 M characters unless the source is cut already. Any copy of the "
            "file text8 serves: pass it, named text8.txt, as the source."
        ),
    ),
    DatasetSpec(
        "wikitext2",
        path="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        text_column="text",
        splits=_OWN_SPLITS,
        detokenizer="wikitext",
        aliases=("wikitext-2",),
    ),
    DatasetSpec(
        "wikitext103",
        path="Salesforce/wikitext",
        config="wikitext-103-raw-v1",
        text_column="text",
        splits=_OWN_SPLITS,
        detokenizer="wikitext",
        aliases=("wikitext-103",),
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
    DatasetSpec(
        "ag_news",
        path="fancyzhx/ag_news",
        text_column="text",
        splits=_TRAIN_TEST,
    ),
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


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


#: Every data set by each of its names, in lower case with hyphens.
DATASETS: dict[str, DatasetSpec] = {_normal(name): row for row in _ROWS for name in (row.name, *row.aliases)}


def find_spec(name_or_path: str) -> DatasetSpec:
    """The table's row of that name, else the hub repository `owner/name`.

    Raises:
        ValueError: neither; the message gives the nearest name.
    """
    row = DATASETS.get(_normal(name_or_path))
    if row is not None:
        return row
    if looks_like_path(name_or_path):
        raise ValueError(f"There is no file or folder {name_or_path!r}; check the path.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path):
        return DatasetSpec(name_or_path, path=name_or_path)
    near = difflib.get_close_matches(_normal(name_or_path), DATASETS, n=1, cutoff=0.5)
    guess = f" Did you mean {DATASETS[near[0]].name!r}?" if near else ""
    raise ValueError(
        f"No data set, file or folder is called {name_or_path!r}.{guess} There are: "
        f"{', '.join(row.name for row in _ROWS)}. A data set of the hub is written owner/name and needs network."
    )


def load_text(
    name_or_path: str | DatasetSpec,
    *,
    split: str = "train",
    text_column: str | None = None,
    config_name: str | None = None,
    source: str | None = None,
    streaming: bool = False,
    skip_bad_rows: bool = False,
    cache_dir: str | None = None,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """The documents of one split, detokenized, in the one column `text`.

    Where a source has only a training split, documents are held out of it by the hash of their name (embedded
    corpora) or text: 5 % for validation and 5 % for the test, each at least one; validation alone where there is a
    test split. A source of a single document is cut instead, into 90, 5 and 5 % of its characters at line ends. A
    plain text file is one document.

    Args:
        name_or_path: a name of the table `DATASETS` (or a row of one's own), a file (.txt, .json, .jsonl, .parquet,
            .csv), a folder of such files, or a hub repository `owner/name`. In a folder, files and subfolders named
            after a split ("validation.jsonl", "test-00000.parquet", "train/a.txt") hold it, all others are training.
        split: "train", "validation" or "test".
        text_column: column of the text, where the table does not say or its copy differs.
        config_name: configuration of a hub repository.
        source: a file, folder or hub repository to read in place of the one in the table, in the same schema.
        streaming: read while iterating instead of beforehand; `packing` such a stream is `PackedStream`'s work.
            Nothing then ensures that a held-out split has a document.
        skip_bad_rows: skip rows without text, and malformed rows of .jsonl files, with a warning; else they are an
            error.
        cache_dir: where the datasets library keeps its files.
        num_proc: processes for detokenizing.

    Raises:
        ValueError: an unknown data set, split or column, an unreadable file, a bad row, an empty data set; the
            message says what to do.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of: {', '.join(SPLITS)}.")
    spec = _spec_of(name_or_path, source, config_name)
    if spec.name in _EMBEDDED and spec.path is None:
        dataset = _only_text(_embedded(spec.name, split, cache_dir), text_column, spec.name)
        return dataset.to_iterable_dataset() if streaming else dataset
    if spec.tail and streaming and spec.documents is None:
        raise ValueError(
            f"The validation split of {spec.name!r} is the last {spec.tail} documents of its source, and to stream it "
            "their number must be known: load it without streaming, or pass a DatasetSpec with documents=..."
        )
    parts = _read(spec, streaming=streaming, skip_bad_rows=skip_bad_rows, cache_dir=cache_dir)
    origin = _origin(parts, spec, split)
    dataset = _only_text(parts[origin], text_column or spec.text_column, spec.name)
    dataset = _without_bad_rows(dataset, spec.name, origin, skip_bad_rows)
    if spec.tail:
        dataset = _head_or_tail(dataset, spec, split)
    elif not spec.splits:
        dataset = hold_out(dataset, split, missing=_held_out_splits(parts))
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The split {split!r} of {spec.name!r} is empty: it has no document. Name another data set.")
    return _detokenized(dataset, spec.detokenizer, num_proc) if spec.detokenizer else dataset


def _spec_of(name_or_path: str | DatasetSpec, source: str | None, config_name: str | None) -> DatasetSpec:
    """The source to read, with what the caller puts in place of the table's entries."""
    if isinstance(name_or_path, DatasetSpec):
        spec = name_or_path
    elif _normal(name_or_path) not in DATASETS and exists(name_or_path):
        spec = DatasetSpec(name_or_path, path=name_or_path)
    else:
        spec = find_spec(name_or_path)
    if source is not None:
        if not exists(source) and looks_like_path(source):
            raise ValueError(f"There is no file or folder {source!r} to read {spec.name!r} from; check the path.")
        spec = replace(spec, path=source, config=None, data_dir=None, revision=None, documents=None)
    if config_name is not None:
        if spec.path is None or exists(spec.path):
            raise ValueError(f"config_name is {config_name!r}, but {spec.name!r} has no configurations; leave it out.")
        spec = replace(spec, config=config_name)
    return spec


def _embedded(name: str, split: str, cache_dir: str | None) -> Dataset:
    """The split of an embedded corpus; its documents are collected once for each Python and kept in the cache."""
    documents = Dataset.from_generator(
        _embedded_rows,
        gen_kwargs={"corpus": name},
        cache_dir=cache_dir,
        fingerprint=Hasher.hash((_VERSION, name, sys.version)),
    )
    scores = np.array([held_out_score(name) for name in documents["name"]])
    return documents.select(members(scores, split, missing=["validation", "test"]))


def _embedded_rows(corpus: str) -> Iterator[dict[str, str]]:
    for document in _EMBEDDED[corpus]():
        yield document._asdict()


def _read(spec: DatasetSpec, *, streaming: bool, skip_bad_rows: bool, cache_dir: str | None) -> Mapping[str, Any]:
    """All splits of the source under the source's own names."""
    assert spec.path is not None
    if exists(spec.path):
        # A file in place of a hub repository with a single split, such as LAMBADA, is that split.
        sources = set(spec.splits.values())
        default = sources.pop() if len(sources) == 1 else "train"
        return load_files(
            spec.path, default_split=default, streaming=streaming, skip_bad_rows=skip_bad_rows, cache_dir=cache_dir
        )
    try:
        parts = load_dataset(
            spec.path,
            name=spec.config,
            data_dir=spec.data_dir,
            revision=spec.revision,
            streaming=streaming,
            cache_dir=cache_dir,
        )
    except (DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        note = f" {spec.note}" if spec.note else ""
        raise ValueError(
            f"The data set {spec.name!r} can not be had from the hub repository {spec.path!r} (network is needed the "
            f"first time): {type(error).__name__}: {error}.{note} Data sets that need no network: "
            f"{', '.join(_EMBEDDED)}, files and folders."
        ) from error
    assert isinstance(parts, DatasetDict | IterableDatasetDict)
    return parts


def _present(parts: Mapping[str, Any], split: str) -> str | None:
    """What the source calls the split, or None where it has none."""
    return next((name for name in _SPLIT_NAMES[split] if name in parts), None)


def _held_out_splits(parts: Mapping[str, Any]) -> list[str]:
    """The splits to hold out of the training split: validation, where there is none, and then a missing test, too."""
    if _present(parts, "validation") is not None:
        return []
    return [split for split in ("validation", "test") if _present(parts, split) is None]


def _origin(parts: Mapping[str, Any], spec: DatasetSpec, split: str) -> str:
    """The source's split to read: its own of that name, or the one out of which it is held."""
    if spec.splits:
        origin = spec.splits.get(split)
    else:
        origin = _present(parts, "train" if split in _held_out_splits(parts) else split)
    if origin is None or origin not in parts:
        raise ValueError(
            f"The data set {spec.name!r} has no split {split!r}; its source has: {', '.join(parts)}"
            + (f"; there are: {', '.join(spec.splits)}." if spec.splits else ".")
        )
    return origin


def _only_text(dataset: Any, column: str | None, name: str) -> Any:
    """The column of the text alone, under the name `text`."""
    if dataset.features is None:
        dataset = dataset._resolve_features()
    features = dataset.features or {}
    strings = [key for key, feature in features.items() if getattr(feature, "dtype", "") in ("string", "large_string")]
    listed = ", ".join(features) or "none at all"
    if column is None:
        column = "text" if "text" in features else strings[0] if len(strings) == 1 else None
    if column is None:
        raise ValueError(f"Which column of {name!r} holds the text? Set text_column; its columns are: {listed}.")
    if column not in features:
        raise ValueError(
            f"The data set {name!r} has no column {column!r}; its columns are: {listed}. Set text_column."
        )
    if column not in strings and getattr(features[column], "dtype", "") != "null":
        kind = getattr(features[column], "dtype", type(features[column]).__name__)
        raise ValueError(f"The column {column!r} of {name!r} holds {kind}, not text; its columns are: {listed}.")
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _without_bad_rows(dataset: Any, name: str, origin: str, skip: bool) -> Any:
    """Refuse rows without text (null), or drop them when asked to."""
    if isinstance(dataset, IterableDataset):
        if skip:
            return dataset.filter(_has_text)
        return dataset.map(_require_text, with_indices=True, fn_kwargs={"name": name, "origin": origin})
    flags = [pc.is_null(table["text"]).to_numpy() for table in dataset.with_format("arrow").iter(10_000)]
    bad = np.flatnonzero(np.concatenate(flags)) if flags else np.empty(0, int)
    if not len(bad):
        return dataset
    if not skip:
        raise _bad_row(name, origin, bad.tolist())
    logger.warning("Skipped %d rows without text of the split %r of %r.", len(bad), origin, name)
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), bad))


def _has_text(row: dict[str, Any]) -> bool:
    return row["text"] is not None


def _require_text(row: dict[str, Any], index: int, *, name: str, origin: str) -> dict[str, Any]:
    if row["text"] is None:
        raise _bad_row(name, origin, [index])
    return row


def _bad_row(name: str, origin: str, rows: list[int]) -> ValueError:
    shown = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    return ValueError(
        f"The split {origin!r} of {name!r} has no text (null) in row {shown}, counted from 0: repair the rows, or "
        "skip them with skip_bad_rows=True."
    )


def _head_or_tail(dataset: Any, spec: DatasetSpec, split: str) -> Any:
    count = spec.documents if isinstance(dataset, IterableDataset) else len(dataset)
    assert count is not None
    if count <= spec.tail:
        raise ValueError(
            f"The source of {spec.name!r} has {count} documents, but the last {spec.tail} are its validation split: "
            "it is not the whole data set. Pass a DatasetSpec with a smaller tail."
        )
    head = count - spec.tail
    return dataset.take(head) if split == "train" else dataset.skip(head)


def _detokenized(dataset: Any, name: str, num_proc: int | None) -> Any:
    if isinstance(dataset, IterableDataset):
        return dataset.map(_detokenize_batch, batched=True, fn_kwargs={"name": name})
    rules = [(str(old), new) for old, new in DETOKENIZERS[name]]
    return dataset.map(
        _detokenize_batch,
        batched=True,
        fn_kwargs={"name": name},
        num_proc=num_proc,
        new_fingerprint=Hasher.hash((_VERSION, dataset._fingerprint, rules)),
        desc="Detokenizing",
    )


def _detokenize_batch(batch: dict[str, list[str]], *, name: str) -> dict[str, list[str]]:
    detokenize = detokenizer(name)
    return {"text": [detokenize(text) for text in batch["text"]]}
