"""Load datasets (paper, App. C.1): from the table of sources, from files, or from the hub.

Every source becomes documents in a single column, `text`, in up to three splits; `load_rows` reads rows of other
schemas in the same way. Missing splits are held out from the training split by a hash, so the choice is the same on
every machine. `bd3lm_hf.data.packing` turns documents into sequences.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from bd3lm_hf.data.corpora import python_docs, python_source
from bd3lm_hf.data.records import Record, columns_of, kinds_of, row_error, rows_of_files, usable_rows
from bd3lm_hf.data.schemas import Schema, TextRow, detect_schema
from bd3lm_hf.data.sources import (
    DATASETS,
    DETOKENIZERS,
    ENDINGS,
    SPLITS,
    DatasetSpec,
    data_ending,
    detokenizer,
    exists,
    find_spec,
    looks_like_path,
    normal,
)
from bd3lm_hf.data.splits import (
    SPLIT_NAMES,
    files_by_split,
    head_or_tail,
    held_out_score,
    held_out_splits,
    hold_out,
    members,
    split_to_read,
)


logger = logging.getLogger(__name__)

_EMBEDDED = {"python-docs": python_docs, "python-source": python_source}

#: Part of every cache key: increase it when the embedded documents, the hold-out or the chunks change.
_VERSION = 1

#: Part of the cache key of files: increase it when the meaning of a record changes.
_FILES_VERSION = 2


def load_text(
    name_or_path: str | os.PathLike | DatasetSpec,
    *,
    split: str = "train",
    text_column: str | None = None,
    config_name: str | None = None,
    source: str | os.PathLike | None = None,
    streaming: bool = False,
    skip_bad_rows: bool = False,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Load the documents of one split, detokenized, as the column `text`.

    If a source has only a training split, documents are held out from it by the hash of their name (embedded corpora)
    or text: 5 % for validation and 5 % for test, at least one each; only validation if there is a test split. A source
    with a single document is cut at line ends instead, into 90, 5 and 5 % of its characters. A plain text file is one
    document.

    Args:
        name_or_path: a name in the table `DATASETS` (or your own `DatasetSpec`), a data file (an ending in `ENDINGS`,
            possibly compressed), a folder of such files, a folder written by `save_to_disk`, or a hub repository
            `owner/name`. See `files_by_split` for the files of each split.
        split: "train", "validation" or "test".
        text_column: column of the text, if the table does not name it or your copy differs.
        config_name: configuration of a hub repository, or of its downloaded copy.
        source: a file, folder or hub repository to read instead of the one in the table, in the same schema.
        streaming: read while iterating instead of in advance; pack such a stream with `PackedStream`. A held-out split
            can then be empty.
        skip_bad_rows: skip rows that have no text or cannot be read, with a warning; otherwise raise an error with
            file and line. After a damaged page of a parquet file, the rest of its row group is lost.
        num_proc: processes for detokenizing.

    Raises:
        ValueError: if the dataset, split or column is unknown, a file or row cannot be read, or the dataset is empty.
    """
    spec = spec_of(name_or_path, source, config_name)
    schema = TextRow(text_column or spec.text_column)
    dataset: Any = load_rows(spec, schema, split=split, streaming=streaming, skip_bad_rows=skip_bad_rows)
    if spec.detokenizer:
        rules = [(str(old), new) for old, new in DETOKENIZERS[spec.detokenizer]]
        options = _map_options(dataset, rules, num_proc=num_proc, desc="Detokenizing")
        dataset = dataset.map(_detokenize_batch, fn_kwargs={"name": spec.detokenizer}, **options)
    if spec.chunk:
        options = _map_options(dataset, spec.chunk, desc="Cutting")
        # One document at a time: it can be as long as text8.
        dataset = dataset.map(_chunk_batch, batch_size=1, fn_kwargs={"size": spec.chunk}, **options)
    return dataset


def load_rows(
    name_or_path: str | os.PathLike | DatasetSpec,
    schema: Schema,
    *,
    split: str = "train",
    config_name: str | None = None,
    source: str | os.PathLike | None = None,
    streaming: bool = False,
    skip_bad_rows: bool = False,
) -> Dataset | IterableDataset:
    """Load the rows of one split as the columns of a schema; the other arguments are those of `load_text`.

    Raises:
        ValueError: as `load_text`.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of: {', '.join(SPLITS)}.")
    spec = spec_of(name_or_path, source, config_name)
    if spec.path is None:
        parts = {split: _load_embedded(spec.name, split)}
        dataset = _Splits(spec, parts).read(split, schema, skip_bad_rows=skip_bad_rows)
        return dataset.to_iterable_dataset() if streaming else dataset
    reader = _reader_of(spec, streaming=streaming)
    origin = split_to_read(reader.splits, spec, split)
    dataset = reader.read(origin, schema, skip_bad_rows=skip_bad_rows)
    if spec.tail:
        dataset = head_or_tail(dataset, spec, split)
    elif not spec.splits:
        dataset = hold_out(dataset, split, missing=held_out_splits(reader.splits))
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The split {split!r} of {spec.name!r} is empty: it has no documents. Name another dataset.")
    return dataset


def find_schema(
    name_or_path: str | os.PathLike | DatasetSpec,
    *,
    config_name: str | None = None,
    source: str | os.PathLike | None = None,
) -> Schema:
    """Return the schema that fits the columns of a source: text, or one for fine-tuning.

    Raises:
        ValueError: as `load_text`; also if the columns fit several schemas.
    """
    spec = spec_of(name_or_path, source, config_name)
    if spec.path is None or spec.text_column is not None:
        return TextRow(spec.text_column)
    reader = _reader_of(spec, streaming=True)
    # The training split first, then the others, because a split can be empty.
    for split in sorted(reader.splits, key=lambda name: name not in SPLIT_NAMES["train"]):
        if columns := reader.columns(split):
            return detect_schema(columns, spec.name)
    raise ValueError(f"The dataset {spec.name!r} is empty: none of its files has a row. Name another one.")


def spec_of(
    name_or_path: str | os.PathLike | DatasetSpec,
    source: str | os.PathLike | None = None,
    config_name: str | None = None,
) -> DatasetSpec:
    """Return the source to read; the caller's arguments override the table's entries.

    Raises:
        ValueError: if there is no such dataset or file, or no such configuration.
    """
    if isinstance(name_or_path, DatasetSpec):
        spec = name_or_path
    elif normal(name := os.fspath(name_or_path)) not in DATASETS and exists(name):
        spec = DatasetSpec(name, path=name)
    else:
        spec = find_spec(name)
    if source is not None:
        source = os.fspath(source)
        if not exists(source) and looks_like_path(source):
            raise ValueError(f"There is no file or folder {source!r} to read {spec.name!r} from; check the path.")
        spec = replace(spec, path=source, config=None, data_dir=None, revision=None, documents=None)
    if config_name is not None:
        if spec.path is None:
            raise ValueError(f"config_name is {config_name!r}, but {spec.name!r} has no configurations; leave it out.")
        spec = replace(spec, config=config_name)
    return spec


def _load_embedded(name: str, split: str) -> Dataset:
    """Load one split of an embedded corpus, whose documents are collected once per Python version."""
    documents = Dataset.from_generator(
        _embedded_rows,
        gen_kwargs={"corpus": name},
        fingerprint=Hasher.hash((_VERSION, name, sys.version)),
    )
    scores = np.array([held_out_score(name) for name in documents["name"]])
    return documents.select(members(scores, split, missing=["validation", "test"]))


def _embedded_rows(corpus: str) -> Iterator[dict[str, str]]:
    for document in _EMBEDDED[corpus]():
        yield document._asdict()


def _reader_of(spec: DatasetSpec, *, streaming: bool) -> "_LocalFiles | _Splits":
    assert spec.path is not None
    if not exists(spec.path):
        return _Splits(spec, _load_hub(spec, streaming))
    # A file that replaces a hub repository with a single split, such as LAMBADA, is that split.
    sources = set(spec.splits.values())
    default = sources.pop() if len(sources) == 1 else "train"
    if any((Path(spec.path).expanduser() / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _Splits(spec, _load_saved(spec, streaming, default))
    return _LocalFiles(spec, files_by_split(spec.path, default, spec.config), streaming=streaming)


class _LocalFiles:
    """Data files by split; every file is a shard of a stream."""

    def __init__(self, spec: DatasetSpec, files: dict[str, list[str]], *, streaming: bool) -> None:
        self.spec, self.files, self.streaming = spec, files, streaming
        self.splits = list(files)

    def columns(self, split: str) -> dict[str, str]:
        # Those of the first file that has any.
        columns = next(filter(None, map(columns_of, self.files[split])), {})
        if not columns:
            next(rows_of_files(self.files[split], TextRow(), skip_bad_rows=False), None)  # reports the first fault
        return columns

    def read(self, split: str, schema: Schema, *, skip_bad_rows: bool) -> Dataset | IterableDataset:
        files = self.files[split]
        columns = self.columns(split)
        if not columns:
            raise self._empty_split(split)
        is_cut = not self.spec.splits and split in SPLIT_NAMES["train"] and held_out_splits(self.splits)
        if self.streaming and is_cut and len(files) == 1 and ENDINGS[data_ending(files[0])] == "text":
            raise ValueError(
                f"The file {files[0]!r} is one document, which a stream cannot cut into training and held-out text: "
                "load it without streaming, or put several files into a folder."
            )
        schema = schema.resolved(columns, self.spec.name)
        arguments = {"files": list(files), "schema": schema, "skip_bad_rows": skip_bad_rows}
        features = Features({name: Value("string") for name in schema.names})
        if self.streaming:
            return IterableDataset.from_generator(rows_of_files, features=features, gen_kwargs=arguments)
        # With the size and time of each file, so an edited file is read again.
        states = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files]
        key = Hasher.hash((_FILES_VERSION, states, type(schema).__name__, vars(schema), skip_bad_rows))
        try:
            return Dataset.from_generator(rows_of_files, features=features, gen_kwargs=arguments, fingerprint=key)
        except DatasetGenerationError as error:
            # A faulty row, or a failure to write the cache, such as a full disk.
            if isinstance(error.__cause__, (ValueError, OSError)):
                raise error.__cause__ from None
            raise
        except ValueError as error:
            if "corresponds to no data" in str(error):
                raise self._empty_split(split) from error
            raise

    def _empty_split(self, split: str) -> ValueError:
        others = [name for name in self.splits if name != split and self.columns(name)]
        choice = f"choose another split ({', '.join(others)})" if others else "name another dataset"
        return ValueError(
            f"The split {split!r} of {self.spec.name!r} is empty: no usable row in "
            f"{', '.join(self.files[split][:3])}. Add rows, or {choice}."
        )


class _Splits:
    """The splits of a hub repository or of a saved dataset, under their own names."""

    def __init__(self, spec: DatasetSpec, parts: Mapping[str, Any]) -> None:
        self.name, self.parts = spec.name, parts
        self.splits = list(parts)

    def columns(self, split: str) -> dict[str, str]:
        # A stream that declares no features is read until its first rows show them.
        dataset = self.parts[split]
        features = dataset.features if dataset.features is not None else dataset._resolve_features().features
        return kinds_of((features or Features()).arrow_schema)

    def read(self, split: str, schema: Schema, *, skip_bad_rows: bool) -> Dataset | IterableDataset:
        dataset, columns = self.parts[split], self.columns(split)
        schema, origin = schema.resolved(columns, self.name), f"the split {split!r} of {self.name!r}"
        if isinstance(dataset, Dataset) and isinstance(schema, TextRow):
            # The text is not copied: it stays in its files.
            (column,) = schema.columns
            dataset = dataset.select_columns([column])
            dataset = dataset if column == "text" else dataset.rename_column(column, "text")
            is_null = [pc.is_null(table["text"]).to_numpy() for table in dataset.with_format("arrow").iter(10_000)]
            bad = np.flatnonzero(np.concatenate([np.empty(0, bool), *is_null])).tolist()
            if bad and not skip_bad_rows:
                raise row_error(f"Row {bad[0]} of {origin} has no text (null)")
            if bad:
                logger.warning("Skipped %d rows without text in %s.", len(bad), origin)
                dataset = dataset.select(np.setdiff1d(np.arange(len(dataset)), bad))
            return dataset
        if isinstance(dataset, Dataset):  # other columns, such as images, would be decoded too
            columns = {name: columns[name] for name in schema.columns if name in columns}
            dataset = dataset.select_columns(list(columns))
        return dataset.map(
            partial(_usable, schema=schema, origin=origin, skip_bad_rows=skip_bad_rows),
            batched=True,
            with_indices=True,
            remove_columns=list(columns),
            features=Features({name: Value("string") for name in schema.names}),
        )


def _load_saved(spec: DatasetSpec, streaming: bool, default_split: str) -> Mapping[str, Any]:
    """Load what `save_to_disk` wrote, a dataset or a dictionary of splits."""
    path = Path(spec.path or "").expanduser()
    if spec.config is not None:
        raise ValueError(f"config_name is {spec.config!r}, but {str(path)!r} has no configurations; leave it out.")
    try:
        saved = load_from_disk(str(path))
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"The dataset {str(path)!r}, written by save_to_disk, cannot be read: {error}") from error
    parts = saved if isinstance(saved, DatasetDict) else {default_split: saved}
    # A saved format such as pandas changes the types of values and hides columns.
    parts = {name: part.with_format(None) for name, part in parts.items()}
    return {name: part.to_iterable_dataset() if streaming else part for name, part in parts.items()}


def _load_hub(spec: DatasetSpec, streaming: bool) -> Mapping[str, Any]:
    assert spec.path is not None
    try:
        parts = load_dataset(
            spec.path,
            name=spec.config,
            data_dir=spec.data_dir,
            revision=spec.revision,
            streaming=streaming,
        )
    except (DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        if "Config name is missing" in str(error):
            raise ValueError(
                f"The dataset {spec.name!r} has several configurations: choose one with config_name "
                f"(--dataset_config). {error}"
            ) from error
        note = f" {spec.note}" if spec.note else ""
        raise ValueError(
            f"Cannot load dataset {spec.name!r} from the hub repository {spec.path!r} (the first load needs a network "
            f"connection): {type(error).__name__}: {error}.{note} Datasets that need no network: "
            f"{', '.join(_EMBEDDED)}, files and folders."
        ) from error
    assert isinstance(parts, DatasetDict | IterableDatasetDict)
    return parts


def _usable(
    batch: dict[str, list[Any]], indices: list[int], *, schema: Schema, origin: str, skip_bad_rows: bool
) -> dict[str, list[str]]:
    """Return the rows of a batch that the schema can read."""
    contents = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    records = [Record(f"row {index}", content) for index, content in zip(indices, contents, strict=True)]
    rows = list(usable_rows(records, origin, schema, skip_bad_rows=skip_bad_rows))
    return {name: [row[name] for row in rows] for name in schema.names}


def _map_options(dataset: Any, key: Any, **options: Any) -> dict[str, Any]:
    """Return the options of a batched `map`; `key` and `options` apply only to datasets that are not streams."""
    if isinstance(dataset, IterableDataset):
        return {"batched": True}
    # The default fingerprint is a hash of the code, which can change without changing the text.
    return {"batched": True, "new_fingerprint": Hasher.hash((_VERSION, dataset._fingerprint, key)), **options}


def _detokenize_batch(batch: dict[str, list[str]], *, name: str) -> dict[str, list[str]]:
    detokenize = detokenizer(name)
    return {"text": [detokenize(text) for text in batch["text"]]}


def _chunk_batch(batch: dict[str, list[str]], *, size: int) -> dict[str, list[str]]:
    """Cut documents into pieces of `size` characters; the last piece of a document may be shorter."""
    return {"text": [text[i : i + size] for text in batch["text"] for i in range(0, len(text), size)]}
