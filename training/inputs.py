"""Load the inputs of a run: documents or fine-tuning rows, a tokenizer, and sequences of the model's length."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from bd3lm_hf.adapt import is_adaptable, load_decoder_tokenizer
from bd3lm_hf.checkpoints import read_config
from bd3lm_hf.data.documents import find_schema, load_rows, load_text
from bd3lm_hf.data.instructions import encode_rows, texts_of
from bd3lm_hf.data.packing import bytes_per_token, evenly_spaced, pack
from bd3lm_hf.data.schemas import SCHEMAS, Schema, TextRow
from bd3lm_hf.data.sources import DatasetSpec
from bd3lm_hf.data.streaming import PackedStream
from bd3lm_hf.modeling.configuration_bd3lm_decoders import BD3LMDecoderConfigMixin
from bd3lm_hf.tokenization import load_tokenizer
from bd3lm_hf.training.arguments import DataArguments
from bd3lm_hf.training.command_line import RunArguments


_TOKENIZER_DOCUMENTS = 100_000  # of a stream, to train a tokenizer on; more would hardly change it
_DOCUMENTS_AT_ONCE = 100


class Documents(NamedTuple):
    """Documents or rows of both splits, before tokenization."""

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset
    schema: Schema  # `TextRow`, or a fine-tuning schema


class TrainingSequences(NamedTuple):
    """Token sequences of both splits."""

    train: Dataset | PackedStream
    validation: Dataset
    bytes_per_token: float | None  # None if the sequences are not running text


def load_documents(data: DataArguments) -> Documents:
    """Load the documents or rows of both splits.

    With `validation_dataset`, files are used whole: nothing is held out.

    Raises:
        ValueError: as `load_text`; also if fine-tuning rows are to be streamed.
    """
    names: dict[str, Any] = {"train": data.dataset, "validation": data.validation_dataset or data.dataset}
    origins = {"train": {"config_name": data.dataset_config, "source": data.dataset_source}}
    origins["validation"] = origins["train"] if data.validation_dataset is None else {}
    schema = _schema(data)
    if data.streaming and not isinstance(schema, TextRow):
        raise ValueError(
            f"--dataset {data.dataset} has {' and '.join(schema.names)}, which are read all at once: leave out "
            "--streaming."
        )
    # With separate held-out text, a file is used as a whole.
    if data.validation_dataset is not None:
        for split, name in names.items():
            if Path(name).expanduser().is_file():
                names[split] = DatasetSpec(name, path=name, splits={split: "train"})
    loaded = {}
    for split, name in names.items():
        options: dict[str, Any] = {"split": split, "skip_bad_rows": data.skip_bad_rows, **origins[split]}
        options["streaming"] = data.streaming and (split == "train" or data.validation_dataset is None)
        if isinstance(schema, TextRow):
            loaded[split] = load_text(name, text_column=data.text_column, num_proc=data.num_proc, **options)
        else:
            loaded[split] = load_rows(name, schema, **options)
    return Documents(loaded["train"], loaded["validation"], schema)


def _schema(data: DataArguments) -> Schema:
    if data.data_format is not None:
        return SCHEMAS[data.data_format]()
    if data.text_column is not None:
        return TextRow(data.text_column)
    return find_schema(data.dataset, config_name=data.dataset_config, source=data.dataset_source)


def make_tokenizer(arguments: RunArguments, documents: Documents) -> Any:
    """Load or train the tokenizer on the main process and send it to the others.

    Raises:
        ValueError: if no tokenizer is found, or it does not fit the model.
    """
    data, model = arguments.data, arguments.model
    tokenizer: list[Any] = [None]
    if arguments.training.process_index == 0:
        # A checkpoint comes with its tokenizer.
        name = data.tokenizer or model.init_from
        stock = None if model.init_from is None else read_config(model.init_from, argument="--init_from")
        if is_adaptable(stock):
            tokenizer = [load_decoder_tokenizer(str(name), stock, model.mask_token_id)]
        else:
            tokenizer = [load_tokenizer(name, texts=_training_texts(documents), vocab_size=data.vocab_size)]
    if arguments.training.world_size > 1:
        broadcast_object_list(tokenizer)
    return tokenizer[0]


def _training_texts(documents: Documents) -> Iterator[str]:
    if not isinstance(documents.schema, TextRow):
        return texts_of(documents.train, documents.schema)
    streamed = isinstance(documents.train, IterableDataset)
    rows = itertools.islice(documents.train, _TOKENIZER_DOCUMENTS) if streamed else documents.train
    return (row["text"] for row in rows)


def make_sequences(
    arguments: RunArguments, documents: Documents, tokenizer: PreTrainedTokenizerBase, config: Any
) -> TrainingSequences:
    """Return the sequences of both splits: of the model's length, or one for each fine-tuning row."""
    data, training = arguments.data, arguments.training
    if not isinstance(documents.schema, TextRow):
        return _make_instructions(arguments, documents, tokenizer, config)
    length = config.model_length
    flags: dict[str, dict[str, Any]] = {
        "train": {"insert_eos": data.insert_train_eos, "insert_special": data.insert_train_special},
        "validation": {"insert_eos": data.insert_valid_eos, "insert_special": data.insert_valid_special},
    }
    options: dict[str, Any] = {"length": length, "packing": data.packing, "num_proc": data.num_proc}
    train: Dataset | PackedStream
    if isinstance(documents.train, IterableDataset):
        seed = training.seed if training.data_seed is None else training.data_seed
        shuffle: dict[str, Any] = {"shuffle_buffer": data.shuffle_buffer, "seed": seed}
        train = PackedStream(documents.train, tokenizer, length=length, **flags["train"], **shuffle)
    else:
        with training.main_process_first(desc="packing the training text"):
            train = evenly_spaced(
                pack(documents.train, tokenizer, **options, **flags["train"]), data.max_train_samples
            )
    held_out = documents.validation
    if isinstance(held_out, IterableDataset):
        assert data.max_eval_samples is not None  # DataArguments requires it
        # Held-out sequences are kept in memory and scored at every evaluation, so a stream is cut short.
        held_out = _first_documents(held_out, tokenizer, data.max_eval_samples * length)
    with training.main_process_first(desc="packing the held-out text"):
        validation = evenly_spaced(pack(held_out, tokenizer, **options, **flags["validation"]), data.max_eval_samples)
    size = bytes_per_token(held_out, tokenizer, insert_eos=data.insert_valid_eos)
    return TrainingSequences(train, validation, size)


def _make_instructions(
    arguments: RunArguments, documents: Documents, tokenizer: PreTrainedTokenizerBase, config: Any
) -> TrainingSequences:
    data = arguments.data
    fill_turns = isinstance(config, BD3LMDecoderConfigMixin) if data.fill_turns is None else data.fill_turns
    encoded = {}
    for split, max_rows in (("train", data.max_train_samples), ("validation", data.max_eval_samples)):
        with arguments.training.main_process_first(desc=f"tokenizing {split}"):
            rows = encode_rows(
                getattr(documents, split),
                documents.schema,
                tokenizer,
                length=config.model_length,
                block_size=config.block_size,
                fill_turns=fill_turns,
                long_rows=data.long_rows,
                num_proc=data.num_proc,
            )
        encoded[split] = evenly_spaced(rows, max_rows)
    return TrainingSequences(encoded["train"], encoded["validation"], None)


def _first_documents(stream: IterableDataset, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """Return the first documents of a stream, enough to have that many tokens together."""
    texts: list[str] = []
    documents, num_tokens = iter(stream), 0
    while num_tokens < tokens:
        batch = [row["text"] for row in itertools.islice(documents, _DOCUMENTS_AT_ONCE)]
        if not batch:
            break
        texts += batch
        ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        num_tokens += sum(map(len, ids))
    return Dataset.from_dict({"text": texts})
