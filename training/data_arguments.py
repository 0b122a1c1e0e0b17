"""The fields of a run that choose its text and how sequences are made of it."""

from dataclasses import dataclass, field

from bd3lm_hf.instructions import LONG_ROWS
from bd3lm_hf.packing import PACKINGS
from bd3lm_hf.schemas import SCHEMAS


@dataclass
class DataArguments:
    """The text and how it becomes token sequences."""

    dataset: str = field(
        default="python-docs",
        metadata={"help": "A name of the table (python-docs, openwebtext, ...), a file, a folder, or a hub name."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_source: str | None = field(
        default=None,
        metadata={"help": "File, folder or hub name to read in place of the table's source, in the same schema."},
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of the text; by default `text`, or the only column of strings."}
    )
    data_format: str | None = field(
        default=None,
        metadata={"help": "text, prompt_completion or messages; by default found by the names of the columns."},
    )
    validation_dataset: str | None = field(
        default=None, metadata={"help": "Held-out text; by default the validation split of `dataset`."}
    )
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip rows that can not be read, with a warning."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the training text while training, for corpora larger than the disk."}
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Sequences of a stream that are shuffled among one another; 0: no shuffle."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Name or folder of a tokenizer; by default one is trained on the text."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Vocabulary of a tokenizer trained here."})
    packing: str = field(
        default="contiguous", metadata={"help": "contiguous, which loses no token, or published, as in the paper."}
    )
    insert_train_eos: bool = field(default=True, metadata={"help": "End every training document with the end token."})
    insert_valid_eos: bool = field(default=True, metadata={"help": "End every held-out document with the end token."})
    insert_train_special: bool = field(
        default=False, metadata={"help": "Put begin and end token around every training sequence."}
    )
    insert_valid_special: bool = field(
        default=False, metadata={"help": "Put begin and end token around every held-out sequence."}
    )
    long_rows: str = field(
        default="error", metadata={"help": "Prompts with completion longer than the model: error, or drop them."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many training sequences at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many held-out sequences at most."})

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_train_samples", "max_eval_samples", "num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: give a whole number of at least 1.")
        if self.shuffle_buffer < 0:
            raise ValueError(f"--shuffle_buffer {self.shuffle_buffer}: give 0 (no shuffle) or more.")
        for name, names in (("packing", PACKINGS), ("long_rows", LONG_ROWS), ("data_format", (None, *SCHEMAS))):
            value = getattr(self, name)
            if value not in names:
                raise ValueError(f"--{name} {value}: choose one of {', '.join(filter(None, names))}.")
        if self.data_format not in (None, "text") and self.text_column is not None:
            raise ValueError(f"--text_column {self.text_column} contradicts --data_format {self.data_format}.")
        if self.streaming:
            self._check_streaming()

    def _check_streaming(self) -> None:
        if self.packing != "contiguous":
            raise ValueError(f"--packing {self.packing} needs the whole data set: leave out --streaming.")
        if self.data_format not in (None, "text"):
            raise ValueError(f"--data_format {self.data_format} reads all rows at once: leave out --streaming.")
        if self.max_train_samples is not None:
            raise ValueError(
                f"--max_train_samples {self.max_train_samples} counts sequences, which a stream does not know: set "
                "--max_steps, and leave it out."
            )
        if self.max_eval_samples is None and self.validation_dataset is None:
            raise ValueError(
                "--streaming keeps the held-out sequences in memory: say how many with --max_eval_samples, or name "
                "them with --validation_dataset."
            )


__all__ = ["DataArguments"]
