"""Documents held out of a training split: by a hash, so that the choice is the same on every machine.

The data sets (paper, App. C.1): `load_text` reads a row of the table of sources, a file or the hub.

Every source becomes documents in one column, `text`, in up to three splits; `load_rows` reads rows of another schema
in the same way. `bd3lm_hf.data.packing` makes sequences of documents.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from bd3lm_hf.data.corpora import python_docs, python_source
from bd3lm_hf.data.files import (
    Schema,
    TextRow,
    columns_of,
    detect_schema,
    exists,
    faulty_rows,
    files_by_split,
    load_files,
    load_usable_rows,
    looks_like_path,
    row_error,
    stream_rows,
)
from bd3lm_hf.data.packing import TextSize, bytes_per_token, pack
from bd3lm_hf.data.sources import DATASETS, DETOKENIZERS, SPLITS, DatasetSpec, detokenizer, find_spec, normal
from bd3lm_hf.data.streaming import PackedStream


#: Fraction of the documents that is held out for validation, and as much again for the test, where a source has none.
HELD_OUT = 0.05


_SEPARATOR = "\x1e"  # between the columns of a row


def held_out_score(key: str) -> float:
    """A number in [0, 1) that depends on the key alone; the smallest scores are held out."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def hold_out(dataset: Any, split: str, missing: list[str]) -> Any:
    """The documents of one split of a source that has only training documents.

    Args:
        dataset: the training documents, a `Dataset` or `IterableDataset` whose columns are all strings.
        split: the split wanted.
        missing: the splits that the source lacks, in the order in which they are held out.

    Returns:
        The data set's documents of that split. A single document is cut; of two or more, training and the splits
        each get one at least, as far as they suffice. A stream is filtered document by document.

    The hash is that of a document's text, or of all columns of a row.
    """
    if split not in ("train", *missing) or not missing:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_in_part, fn_kwargs={"split": split, "missing": missing})
    if len(dataset) == 1 and dataset.column_names == ["text"]:
        return _cut(dataset, split, missing)
    rows = (row for batch in dataset.iter(1000) for row in zip(*batch.values(), strict=True))
    scores = np.array([held_out_score(_SEPARATOR.join(row)) for row in rows])
    return dataset.select(members(scores, split, missing))


def _in_part(row: dict[str, str], *, split: str, missing: list[str]) -> bool:
    part = int(held_out_score(_SEPARATOR.join(row.values())) / HELD_OUT)
    return (missing[part] if part < len(missing) else "train") == split


def members(scores: np.ndarray, split: str, missing: list[str]) -> np.ndarray:
    """Indices, in the source's order, of the split's documents by `held_out_score`; no split is left empty."""
    order = np.argsort(scores, kind="stable")
    start, bounds = 0, {}
    for part, name in enumerate(missing):
        spare = len(scores) - 1 - start  # training keeps a document
        spare = max(spare - (len(missing) - 1 - part), min(spare, 1), 0)  # and so does each part behind this one
        count = min(max(int((scores < HELD_OUT * (part + 1)).sum()) - start, 1), spare)
        bounds[name] = (start, start + count)
        start += count
    first, last = bounds.get(split, (start, len(scores)))
    return np.sort(order[first:last])


def _cut(dataset: Dataset, split: str, missing: list[str]) -> Dataset:
    """Cut a single document at the end of the line in which 90 and 95 % of its characters are reached.

    A line whose end is nearer to the next cut is cut inside: text8 is a single line.
    """
    text = dataset[0]["text"]
    length = len(text.rstrip("\n"))
    places = [0]
    for part in range(len(missing), 0, -1):
        place = round(length * (1 - HELD_OUT * part))
        line_end = text.find("\n", max(place - 1, 0), place + round(length * HELD_OUT / 2))
        places.append(line_end + 1 if line_end >= 0 else place)
    places.append(len(text))
    part = ["train", *missing].index(split)
    return Dataset.from_dict({"text": [piece] if (piece := text[places[part] : places[part + 1]]) else []})


logger = logging.getLogger(__name__)


#: What sources call the three splits.
_SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


_EMBEDDED = {"python-docs": python_docs, "python-source": python_source}


#: Part of every cache key: raise it when the embedded documents, the hold-out or the chunks change.
_VERSION = 1


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
        streaming: read while iterating instead of beforehand; packing such a stream is `PackedStream`'s work. Nothing
            then ensures that a held-out split has a document.
        skip_bad_rows: skip rows that hold no text or can not be read, with a warning; else they are an error, which
            names file and place. A damaged page of a parquet file takes the rest of its row group with it.
        cache_dir: where the datasets library keeps its files.
        num_proc: processes for detokenizing.

    Raises:
        ValueError: an unknown data set, split or column, an unreadable file, a bad row, an empty data set; the
            message says what to do.
    """
    spec = _spec_of(name_or_path, source, config_name)
    schema = TextRow(text_column or spec.text_column)
    dataset = load_rows(
        spec, schema, split=split, streaming=streaming, skip_bad_rows=skip_bad_rows, cache_dir=cache_dir
    )
    if spec.detokenizer:
        dataset = _detokenized(dataset, spec.detokenizer, num_proc)
    return _chunked(dataset, spec.chunk) if spec.chunk else dataset


def load_rows(
    name_or_path: str | DatasetSpec,
    schema: Schema,
    *,
    split: str = "train",
    config_name: str | None = None,
    source: str | None = None,
    streaming: bool = False,
    skip_bad_rows: bool = False,
    cache_dir: str | None = None,
) -> Dataset | IterableDataset:
    """The rows of one split in the columns of a schema, as the source holds them; the arguments of `load_text`.

    Raises:
        ValueError: as `load_text`.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of: {', '.join(SPLITS)}.")
    spec = _spec_of(name_or_path, source, config_name)
    if spec.path is None:
        dataset = _embedded(spec.name, split, cache_dir)
        resolved = schema.resolved(_kinds(dataset), spec.name)
        assert isinstance(resolved, TextRow)  # the corpora have no columns of another schema
        dataset = _only_text(dataset, resolved)
        return dataset.to_iterable_dataset() if streaming else dataset
    reader = _Files(spec, cache_dir) if exists(spec.path) else _Hub(spec, cache_dir)
    origin = _origin(reader.splits(streaming), spec, split)
    dataset = reader.read(origin, schema, streaming=streaming, skip_bad_rows=skip_bad_rows)
    if spec.tail:
        dataset = _head_or_tail(dataset, spec, split)
    elif not spec.splits:
        dataset = hold_out(dataset, split, missing=_held_out_splits(reader.splits(streaming)))
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The split {split!r} of {spec.name!r} is empty: it has no document. Name another data set.")
    return dataset


def find_schema(
    name_or_path: str | DatasetSpec, *, config_name: str | None = None, source: str | None = None
) -> Schema:
    """What the rows of a source hold, by the columns of its first split: text, or what a fine-tuning needs.

    Raises:
        ValueError: as `load_text`; also if the columns fit several schemas.
    """
    spec = _spec_of(name_or_path, source, config_name)
    if spec.path is None or spec.text_column is not None:
        return TextRow(spec.text_column)
    reader = _Files(spec, None) if exists(spec.path) else _Hub(spec, None)
    return detect_schema(reader.columns(), spec.name)


def _spec_of(name_or_path: str | DatasetSpec, source: str | None, config_name: str | None) -> DatasetSpec:
    """The source to read, with what the caller puts in place of the table's entries."""
    if isinstance(name_or_path, DatasetSpec):
        spec = name_or_path
    elif normal(name_or_path) not in DATASETS and exists(name_or_path):
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


class _Files:
    """A file or folder, by the splits that its files are named after."""

    def __init__(self, spec: DatasetSpec, cache_dir: str | None) -> None:
        assert spec.path is not None
        # A file in place of a hub repository with a single split, such as LAMBADA, is that split.
        sources = set(spec.splits.values())
        default = sources.pop() if len(sources) == 1 else "train"
        self.spec, self.cache_dir = spec, cache_dir
        self.files = files_by_split(spec.path, default)

    def splits(self, streaming: bool) -> list[str]:
        return list(self.files)

    def columns(self) -> dict[str, str]:
        return columns_of(next(iter(self.files.values())))

    def read(self, origin: str, schema: Schema, *, streaming: bool, skip_bad_rows: bool) -> Dataset | IterableDataset:
        files, name = self.files[origin], self.spec.name
        if streaming or skip_bad_rows or not isinstance(schema, TextRow):
            if streaming and not self.spec.splits and files == [name] and name.endswith(".txt"):
                raise ValueError(
                    f"The file {name!r} is one document, which a stream can not cut into training and held-out text: "
                    "load it without streaming, or put files into a folder."
                )
            schema = schema.resolved(columns_of(files), name)
            if streaming:
                return stream_rows(files, schema, skip_bad_rows=skip_bad_rows)
            return load_usable_rows(files, schema, skip_bad_rows=skip_bad_rows, cache_dir=self.cache_dir)
        dataset = load_files(files, schema, cache_dir=self.cache_dir)
        try:
            schema = schema.resolved(_kinds(dataset), name)
        except ValueError:
            # A column that begins with text is one of text, in which a row holds something else.
            schema = schema.resolved(columns_of(files), name)
            raise row_error(faulty_rows(files, schema)) from None
        dataset = _only_text(dataset, schema)
        if len(_rows_without_text(dataset)):
            raise row_error(faulty_rows(files, schema))
        return dataset


class _Hub:
    """A repository of the hub."""

    def __init__(self, spec: DatasetSpec, cache_dir: str | None) -> None:
        self.spec, self.cache_dir = spec, cache_dir
        self.parts: dict[bool, Mapping[str, Any]] = {}

    def splits(self, streaming: bool) -> list[str]:
        return list(self._parts(streaming))

    def columns(self) -> dict[str, str]:
        return _kinds(next(iter(self._parts(streaming=True).values())))

    def read(self, origin: str, schema: Schema, *, streaming: bool, skip_bad_rows: bool) -> Dataset | IterableDataset:
        dataset, name = self._parts(streaming)[origin], self.spec.name
        schema = schema.resolved(_kinds(dataset), name)
        if isinstance(dataset, Dataset) and isinstance(schema, TextRow):
            dataset = _only_text(dataset, schema)
            bad = _rows_without_text(dataset)
            if len(bad) and not skip_bad_rows:
                raise row_error([f"Row {row} of the split {origin!r} of {name!r} has no text (null)" for row in bad])
            if len(bad):
                logger.warning("Skipped %d rows without text of the split %r of %r.", len(bad), origin, name)
                dataset = dataset.select(np.setdiff1d(np.arange(len(dataset)), bad))
            return dataset
        place = f"the split {origin!r} of {name!r}"
        return dataset.map(
            partial(_usable, schema=schema, place=place, skip_bad_rows=skip_bad_rows),
            batched=True,
            with_indices=True,
            remove_columns=list(_kinds(dataset)),
            features=schema.features,
        )

    def _parts(self, streaming: bool) -> Mapping[str, Any]:
        """All splits of the source under the source's own names."""
        if streaming not in self.parts:
            self.parts[streaming] = _load_hub(self.spec, streaming, self.cache_dir)
        return self.parts[streaming]


def _load_hub(spec: DatasetSpec, streaming: bool, cache_dir: str | None) -> Mapping[str, Any]:
    assert spec.path is not None
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


def _usable(
    batch: dict[str, list[Any]], indices: list[int], *, schema: Schema, place: str, skip_bad_rows: bool
) -> dict[str, list[str]]:
    """The rows of a batch that the schema can read."""
    columns: dict[str, list[str]] = {name: [] for name in schema.names}
    for row, index in enumerate(indices):
        try:
            content = schema.read({name: values[row] for name, values in batch.items()})
        except ValueError as error:
            fault = f"Row {index} of {place} {error}"
            if not skip_bad_rows:
                raise row_error([fault]) from None
            logger.warning("Skipped: %s.", fault)
        else:
            for name, value in content.items():
                columns[name].append(value)
    return columns


def _present(parts: Sequence[str], split: str) -> str | None:
    """What the source calls the split, or None where it has none."""
    return next((name for name in _SPLIT_NAMES[split] if name in parts), None)


def _held_out_splits(parts: Sequence[str]) -> list[str]:
    """The splits to hold out of the training split: validation, where there is none, and then a missing test, too."""
    if _present(parts, "validation") is not None:
        return []
    return [split for split in ("validation", "test") if _present(parts, split) is None]


def _origin(parts: Sequence[str], spec: DatasetSpec, split: str) -> str:
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


def _kinds(dataset: Dataset | IterableDataset) -> dict[str, str]:
    """The columns of a data set, and what each holds."""
    if dataset.features is None:
        dataset = dataset._resolve_features()
    features = dataset.features or {}
    return {name: getattr(feature, "dtype", type(feature).__name__) for name, feature in features.items()}


def _only_text(dataset: Dataset, schema: TextRow) -> Dataset:
    """The column of the text alone, under the name `text`."""
    column = schema.column
    assert column is not None
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _rows_without_text(dataset: Dataset) -> list[int]:
    flags = [pc.is_null(table["text"]).to_numpy() for table in dataset.with_format("arrow").iter(10_000)]
    return np.flatnonzero(np.concatenate(flags)).tolist() if flags else []


def _head_or_tail(dataset: Any, spec: DatasetSpec, split: str) -> Any:
    """All documents but the last `spec.tail`, or those."""
    streamed = isinstance(dataset, IterableDataset)
    if streamed and split != "train":
        return _tail_of_stream(dataset, spec)
    count = spec.documents if streamed else len(dataset)
    if count is None:
        raise ValueError(
            f"The training split of {spec.name!r} is all but the last {spec.tail} documents of its source, and to "
            "stream it their number must be known: load it without streaming, or pass a DatasetSpec with documents=..."
        )
    _check_whole(count, spec)
    head = count - spec.tail
    return dataset.take(head) if split == "train" else dataset.skip(head)


def _tail_of_stream(dataset: IterableDataset, spec: DatasetSpec) -> IterableDataset:
    """The last documents, for which the last files alone are read."""
    first, count = dataset.num_shards, 0
    while count < spec.tail and first > 0:
        first -= 1
        count += sum(1 for _ in dataset.shard(dataset.num_shards, first))
    if first == 0:
        _check_whole(count, spec)
    files = [dataset.shard(dataset.num_shards, index) for index in range(first, dataset.num_shards)]
    return concatenate_datasets(files).skip(count - spec.tail)


def _check_whole(count: int, spec: DatasetSpec) -> None:
    if count <= spec.tail:
        raise ValueError(
            f"The source of {spec.name!r} has {count} documents, but the last {spec.tail} are its validation split: "
            "it is not the whole data set. Pass a DatasetSpec with a smaller tail."
        )


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


def _chunked(dataset: Any, size: int) -> Any:
    """Documents cut into pieces of `size` characters; the last piece of a document may be shorter."""
    keywords: dict[str, Any] = {"batched": True, "batch_size": 1, "fn_kwargs": {"size": size}}
    if isinstance(dataset, Dataset):
        keywords |= {"new_fingerprint": Hasher.hash((_VERSION, dataset._fingerprint, size)), "desc": "Cutting"}
    return dataset.map(_chunk_batch, **keywords)


def _chunk_batch(batch: dict[str, list[str]], *, size: int) -> dict[str, list[str]]:
    return {"text": [text[i : i + size] for text in batch["text"] for i in range(0, len(text), size)]}


__all__ = [
    "DATASETS",
    "DatasetSpec",
    "PackedStream",
    "TextSize",
    "bytes_per_token",
    "find_schema",
    "find_spec",
    "held_out_score",
    "load_rows",
    "load_text",
    "pack",
]
