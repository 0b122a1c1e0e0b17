"""The fields of a run that choose its text and how sequences are made of it.

A run is a recipe plus overrides: the fields of a training run, read from one YAML file and the command line.
"""

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, IntervalStrategy, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy

from bd3lm_hf.data.files import SCHEMAS
from bd3lm_hf.data.instructions import LONG_ROWS
from bd3lm_hf.data.packing import PACKINGS
from bd3lm_hf.data.sources import DEFAULT_DATASET
from bd3lm_hf.output_files import write_atomically
from bd3lm_hf.run_folder import RECIPE_HEADER
from bd3lm_hf.training.initial_model import fit_to_type
from bd3lm_hf.training.interval import METHODS, PUBLISHED_STEP, Interval, candidate_intervals, parse_interval


@dataclass
class DataArguments:
    """The text and how it becomes token sequences."""

    dataset: str = field(
        default=DEFAULT_DATASET,
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


RECIPES = Path(__file__).resolve().parent / "recipes"


DEFAULT_RECIPE = "demo"


@dataclass
class ModelArguments:
    """The network. A field left out takes the default of the model type, or the checkpoint's value."""

    model_type: str = field(default="bd3lm", metadata={"help": "Model type, as in `AutoConfig.for_model`."})
    init_from: str | None = field(
        default=None,
        metadata={"aliases": ["--model_name_or_path"], "help": "Folder or hub name of weights to start from."},
    )
    block_size: int | None = field(default=None, metadata={"help": "Tokens of a block; divides model_length."})
    model_length: int | None = field(default=None, metadata={"help": "Tokens of a training sequence."})
    hidden_dim: int | None = field(default=None, metadata={"help": "Width of the residual stream."})
    n_blocks: int | None = field(default=None, metadata={"help": "Number of transformer layers."})
    n_heads: int | None = field(default=None, metadata={"help": "Number of attention heads."})
    cond_dim: int | None = field(default=None, metadata={"help": "Width of the noise-level embedding."})
    dropout: float | None = field(default=None, metadata={"help": "Dropout of the residual branches."})
    noise: str | None = field(
        default=None, metadata={"help": "Noise schedule: loglinear, square, ... (paper, Table 8)."}
    )
    adaln: bool | None = field(default=None, metadata={"help": "Adaptive layer norm."})
    time_conditioning: bool | None = field(default=None, metadata={"help": "Feed the noise level to the network."})
    sampling_eps_min: float | None = field(
        default=None, metadata={"help": "Lower end of the interval of noise levels."}
    )
    sampling_eps_max: float | None = field(
        default=None, metadata={"help": "Upper end of the interval of noise levels."}
    )
    resample: bool | None = field(
        default=None, metadata={"help": "Keep the mask rate of every block in the interval."}
    )
    antithetic_sampling: str | None = field(
        default=None, metadata={"help": "Stratification of the noise levels: shuffled, published or none."}
    )
    noise_draws: int | None = field(
        default=None, metadata={"help": "Noisy streams that share one clean stream in a step; the loss is their mean."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel: eager, sdpa or flex."})
    num_denoising_steps: int | None = field(
        default=None, metadata={"help": "Steps of a block when samples are written; saved in the generation config."}
    )

    def __post_init__(self) -> None:
        if self.num_denoising_steps is not None and self.num_denoising_steps < 1:
            raise ValueError(f"--num_denoising_steps {self.num_denoising_steps}: give a whole number of at least 1.")

    def config_fields(self) -> dict[str, Any]:
        """The configuration fields that were given, by name."""
        own = ("model_type", "init_from", "attn_implementation", "num_denoising_steps")
        return {name: value for name, value in asdict(self).items() if name not in own and value is not None}


@dataclass
class LoraArguments:
    """Low-rank adapters (LoRA): small matrices beside frozen weights are all that trains."""

    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapters; without it all weights train."})
    lora_alpha: int = field(default=16, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the adapted layers, or all-linear; by default attention and MLP of every layer."},
    )

    def __post_init__(self) -> None:
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"--lora_r {self.lora_r}: give a whole number of at least 1.")
        if self.lora_alpha < 1:
            raise ValueError(f"--lora_alpha {self.lora_alpha}: give a whole number of at least 1.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"--lora_dropout {self.lora_dropout}: give a probability of at least 0 and below 1.")
        given = [item.name for item in fields(self)[1:] if getattr(self, item.name) != item.default]
        if self.lora_r is None and given:
            raise ValueError(f"--{given[0]} is given without --lora_r: set the rank of the adapters, for instance 8.")


@dataclass
class IntervalSearchArguments:
    """The search for the interval of noise levels, at each evaluation; see `training/interval.py`."""

    interval_search: bool = field(
        default=False,
        metadata={"help": "At each evaluation, adopt the interval of noise levels whose losses vary least."},
    )
    interval_search_widths: list[float] | None = field(
        default=None,
        metadata={
            "help": "Widths to search; by default the paper's, 0.5 to 0.9, unless interval_candidates is given."
        },
    )
    interval_search_step: float = field(
        default=PUBLISHED_STEP, metadata={"help": "Distance of the lower ends of intervals of one width."}
    )
    interval_candidates: list[str] | None = field(
        default=None, metadata={"help": "Own intervals to compare with the whole one, such as 0.3-0.8 0.45-0.95."}
    )
    interval_search_batches: int = field(
        default=100, metadata={"help": "Held-out batches (of all processes together) to look at."}
    )
    interval_search_method: str = field(
        default="shared",
        metadata={"help": "shared: at most 12 noisy passes over a batch; published: one for each interval."},
    )
    interval_search_fixed: bool = field(
        default=False, metadata={"help": "Search and log, but keep the interval as it is."}
    )

    def interval_list(self, block_size: int) -> list[Interval]:
        """The candidates of a model with blocks of this size, the whole interval first."""
        return candidate_intervals(
            block_size,
            widths=self.interval_search_widths,
            step=self.interval_search_step,
            own=[parse_interval(text) for text in self.interval_candidates or ()],
        )

    def _check_interval_search(self, *, evaluates: bool) -> None:
        self.interval_list(block_size=4)
        if self.interval_search_batches < 1:
            raise ValueError(
                f"--interval_search_batches {self.interval_search_batches}: give a whole number of at least 1."
            )
        if self.interval_search_method not in METHODS:
            raise ValueError(
                f"--interval_search_method {self.interval_search_method}: choose one of {', '.join(METHODS)}."
            )
        if self.interval_search and not evaluates:
            raise ValueError(
                "--interval_search true searches at each evaluation: set --eval_strategy to steps or epoch."
            )
        for item in fields(IntervalSearchArguments):
            if not self.interval_search and getattr(self, item.name) != item.default:
                raise ValueError(f"--{item.name} asks for a search of the interval: add --interval_search true.")


@dataclass
class BD3LMTrainingArguments(IntervalSearchArguments, TrainingArguments):
    """transformers' `TrainingArguments` with the paper's optimisation as defaults (AdamW, 2,500 warm-up steps)."""

    output_dir: str = field(default="bd3lm-output", metadata={"help": "Folder of the run."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train into output_dir although it holds files; checkpoints of an earlier run are removed."},
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Learning-rate schedule, as in transformers."}
    )
    warmup_steps: float = field(
        default=2500, metadata={"help": "Warm-up steps; below 1 a share of all optimizer steps."}
    )
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradient norm above which gradients are scaled down."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Log every so many optimizer steps."})
    # A loss that is not finite stops the run (trainer.py); the filter would hide it from the log.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of logs."}
    )
    # All weights of our models take part in every step; looking for others costs a walk through the graph.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Have DistributedDataParallel look for weights without a gradient."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences of one optimizer step over all processes; decides gradient_accumulation_steps. The "
            "paper's 512 on any number of processes."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Evaluate and save an exponential moving average of the weights; the paper's is 0.9999."},
    )
    ema_warmup: bool = field(
        default=True, metadata={"help": "Start the average with a lower decay, (1 + n) / (10 + n) in update n."}
    )
    eval_estimator: str = field(
        default="stratified", metadata={"help": "Likelihood estimator of evaluations: sampled, stratified or exact."}
    )
    final_estimator: str | None = field(
        default=None,
        metadata={"help": "Estimator of the likelihood before and after training; eval_estimator by default."},
    )
    eval_num_samples: int = field(default=1, metadata={"help": "Noise draws per held-out sequence."})
    sample_prompt: str = field(default="", metadata={"help": "Prompt of the text sample written at each evaluation."})
    sample_tokens: int = field(default=64, metadata={"help": "Tokens of that sample; 0 writes none."})
    peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "Peak TFLOP/s of one device, for the model FLOPs utilisation (MFU); known for common NVIDIA GPUs."
        },
    )

    def __post_init__(self) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and (parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()):
            # Several processes without a GPU talk through gloo, which transformers chooses only when told so.
            self.use_cpu = True
        self.bf16 = self.bf16 or _deepspeed_takes_bf16()
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = self._accumulation(launched)
        super().__post_init__()
        if self.world_size != launched:
            raise ValueError(
                f"the launcher started {launched} processes but this run sees {self.world_size}, so each would train "
                f"alone: pass --use_cpu if the processes are meant to run on the CPU."
            )
        if self.eval_num_samples < 1:
            raise ValueError(f"--eval_num_samples {self.eval_num_samples}: give a whole number of at least 1.")
        if self.sample_tokens < 0:
            raise ValueError(f"--sample_tokens {self.sample_tokens}: give 0 (no sample) or more.")
        self._check_hub()
        self._check_interval_search(evaluates=self.eval_strategy != IntervalStrategy.NO)
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"--peak_tflops {self.peak_tflops}: give a number above 0, or leave it out.")
        if self.report_to:
            _check_reporters(self.report_to)
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay {self.ema_decay}: give a number from 0 (no average) to below 1.")
        if getattr(self.accelerator_config, "split_batches", False):
            raise ValueError(
                "accelerator_config split_batches=True would give each process a part of per_device_train_batch_size: "
                "leave it out and set --global_batch_size."
            )
        if self.global_batch_size is not None and (self.n_gpu > 1 or self.auto_find_batch_size):
            raise ValueError(
                f"--global_batch_size {self.global_batch_size} needs a batch size per device that stays: start one "
                f"process per GPU with accelerate launch, and leave out --auto_find_batch_size."
            )

    def _check_hub(self) -> None:
        if self.hub_token is not None:
            raise ValueError(
                "--hub_token would be written into the run's folder: log in with `hf auth login`, or set HF_TOKEN."
            )
        if self.push_to_hub and self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"--hub_strategy {HubStrategy(self.hub_strategy).value} would upload optimizer states and pickles: "
                f"choose every_save or end."
            )

    def _accumulation(self, processes: int) -> int:
        """The accumulated batches that make up `global_batch_size`.

        Raises:
            ValueError: there is no such number, or another one was given.
        """
        wanted, device = self.global_batch_size or 0, self.per_device_train_batch_size
        batch = processes * device
        if wanted < 1 or wanted % batch:
            nearest = max(1, round(wanted / batch)) * batch
            raise ValueError(
                f"--global_batch_size {wanted} is no multiple of {processes} processes x "
                f"--per_device_train_batch_size {device}: the nearest that works is {nearest}."
            )
        steps = wanted // batch
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps} contradicts --global_batch_size "
                f"{wanted}, which takes {steps}: leave it out."
            )
        return steps


def _deepspeed_takes_bf16() -> bool:
    """Whether the launcher's DeepSpeed configuration has bfloat16, with which the run's fields must agree."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"


def _check_reporters(names: Sequence[str]) -> None:
    """Refuse what can not be reported to. transformers finds out after the data are made, and ends with a traceback.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
    """
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"--report_to has {_unknown(name, [*INTEGRATION_TO_CALLBACK], 'place')}")
        if name not in installed and name != "flyte":  # which transformers does not look for
            raise ValueError(
                f"--report_to {name}: the package {name} is not installed. Run `pip install {name}`, or report to "
                f"{' or '.join([*installed, 'none'])}."
            )


class RunArguments(NamedTuple):
    """Everything that defines a run."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    training: BD3LMTrainingArguments
    given: dict[str, Any]  # the fields that differ from the defaults, as they were written


class _Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one `ValueError` instead of a page of usage and an exit."""

    given: dict[str, Any]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # The dataclasses derive further values from these, which a recipe must not repeat.
        namespace, rest = super().parse_known_args(args, namespace)
        defaults = vars(super().parse_known_args([])[0])
        self.given = {name: value for name, value in vars(namespace).items() if value != defaults[name]}
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


_GROUPS: tuple[Any, ...] = (ModelArguments, DataArguments, LoraArguments, BD3LMTrainingArguments)


def field_names() -> list[str]:
    """Names of all fields that a recipe or the command line may set."""
    return [item.name for group in _GROUPS for item in fields(group) if item.init]


def parse_arguments(argv: Sequence[str]) -> RunArguments:
    """Read `[recipe.yaml] [--field value ...]`; the command line overrides the recipe, the recipe the defaults.

    Args:
        argv: arguments without the program's name. The recipe is a file or the name of one that ships (`demo`);
            without one the `demo` recipe is the base. Of a recipe for another model type than the command line's,
            fields that this type does not share are left out, with a note.

    Raises:
        ValueError: unreadable recipe, unknown field (the nearest one is named), or a value that a field cannot take.
    """
    argv = list(argv)
    named = bool(argv) and not argv[0].startswith("-")
    recipe = read_recipe(argv.pop(0) if named else DEFAULT_RECIPE)
    if not named and any(word.split("=")[0].replace("-", "_") in _INIT_FLAGS for word in argv):
        # The demo's network would contradict the one that is loaded.
        shapes = {item.name for item in fields(ModelArguments)}
        recipe = {name: value for name, value in recipe.items() if name not in shapes}
    recipe = fit_to_type(recipe, argv, model_fields=[item.name for item in fields(ModelArguments)])
    parser = _Parser(list(_GROUPS), allow_abbrev=False)
    words = [word for name, value in recipe.items() for word in _as_words(name, value)] + argv
    *groups, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        raise ValueError(_unknown(rest[0], [f"--{name}" for name in field_names()], "argument"))
    model, data, lora, training = groups
    arguments = RunArguments(model, data, lora, training, parser.given)
    if arguments.data.streaming and arguments.training.max_steps < 1:
        raise ValueError("--streaming reads text without an end to count epochs by: set --max_steps.")
    if arguments.lora.lora_r is not None and arguments.training.interval_search:
        raise ValueError(
            f"--interval_search with --lora_r {arguments.lora.lora_r}: an adapter does not keep the interval. Choose "
            f"it with --sampling_eps_min and --sampling_eps_max, or train all weights."
        )
    return arguments


_INIT_FLAGS = ("__init_from", "__model_name_or_path")


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """The fields that a recipe sets.

    Args:
        name_or_path: a YAML file, or the name of a recipe that ships with the package.

    Raises:
        ValueError: no such recipe, not a YAML mapping, or a field that does not exist.
    """
    path = Path(name_or_path)
    shipped = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
    if not path.is_file() and name_or_path in shipped:
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ValueError(
            f"there is no recipe {name_or_path!r}: give a YAML file or one of {', '.join(shipped)}. Fields are set "
            f"with --field value."
        )
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the recipe {path} is no readable YAML: {reason}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {path} holds a {type(recipe).__name__}: write one `field: value` per line.")
    known = field_names()
    for name in recipe:
        if name not in known:
            raise ValueError(f"the recipe {path} has {_unknown(str(name), known, 'field')}")
    return recipe


def write_recipe(arguments: RunArguments, path: str | Path) -> None:
    """Write the fields that were given as a recipe that repeats the run in another folder."""
    place = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
    given = {name: value for name, value in arguments.given.items() if name not in place}
    text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    write_atomically(path, f"{RECIPE_HEADER}\n{text}")


def _as_words(name: str, value: Any) -> list[str]:
    """A recipe's field as command-line words, so that both are checked by one parser; `null` is the default."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, (dict, bool)):
        return [f"--{name}={json.dumps(value)}"]
    return [f"--{name}={value}"]


def _unknown(name: str, known: list[str], kind: str) -> str:
    name = name.split("=")[0]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "see --help for the fields."
    return f"an unknown {kind} {name!r}: {hint}"


__all__ = [
    "BD3LMTrainingArguments",
    "DataArguments",
    "IntervalSearchArguments",
    "LoraArguments",
    "ModelArguments",
    "RunArguments",
    "field_names",
    "parse_arguments",
    "read_recipe",
    "write_recipe",
]
