"""The fields of a run in four groups (model, data, adapters, training), and checks that they are consistent."""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from accelerate.utils import is_deepspeed_available, parse_flag_from_env
from transformers import IntervalStrategy, SchedulerType, TrainingArguments, get_scheduler
from transformers.hf_argparser import HfArg
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy

from bd3lm_hf.console import check_minimum
from bd3lm_hf.data.instructions import LONG_ROWS
from bd3lm_hf.data.schemas import SCHEMAS
from bd3lm_hf.data.sources import DEFAULT_DATASET, PACKINGS
from bd3lm_hf.training.examples import BlockSizeSchedule
from bd3lm_hf.training.interval import METHODS, PUBLISHED_STEP, Interval, candidate_intervals, parse_interval


def option(default: Any, text: str, *, aliases: list[str] | None = None, choices: Iterable[str] | None = None) -> Any:
    """Return a field with its help text; typed as any value, where `HfArg` is typed as a field."""
    metadata = None if choices is None else {"choices": choices}  # for argparse
    return HfArg(default=default, help=text, aliases=aliases, metadata=metadata)


@dataclass
class DataArguments:
    """The text, and how it becomes token sequences."""

    dataset: str = option(
        DEFAULT_DATASET, "Dataset name (python-docs, the default, or openwebtext, ...), file, folder, or hub name."
    )
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_source: str | None = option(
        None, "File, folder or hub name to read instead of the dataset's own source, in the same schema."
    )
    text_column: str | None = option(None, "Column of the text; by default `text`, or the only column of strings.")
    data_format: str | None = option(
        None, "text, prompt_completion or messages; by default inferred from the column names.", choices=SCHEMAS
    )
    validation_dataset: str | None = option(None, "Held-out text; by default the validation split of `dataset`.")
    skip_bad_rows: bool = option(False, "Skip records that cannot be read, with a warning.")
    streaming: bool = option(False, "Read the training text while training, for corpora larger than the disk.")
    shuffle_buffer: int = option(10_000, "Size of a stream's shuffle buffer, in sequences; 0 disables shuffling.")
    num_proc: int | None = option(None, "Number of processes that prepare the data.")
    tokenizer: str | None = option(None, "Name or folder of a tokenizer; by default one is trained on the text.")
    vocab_size: int = option(4096, "Vocabulary size of a tokenizer trained here.")
    packing: str = option(
        "contiguous", "contiguous, which loses no token, or published, as in the paper.", choices=PACKINGS
    )
    insert_train_eos: bool = option(True, "End every training document with EOS.")
    insert_valid_eos: bool = option(True, "End every held-out document with EOS.")
    insert_train_special: bool = option(False, "Put BOS and EOS around every training sequence.")
    insert_valid_special: bool = option(False, "Put BOS and EOS around every held-out sequence.")
    long_rows: str = option(
        "error", "What to do with fine-tuning rows longer than model_length: error or drop.", choices=LONG_ROWS
    )
    fill_turns: bool | None = option(
        None, "Fill the block in which a turn ends with scored EOS; default: for adapted decoders only."
    )
    max_train_samples: int | None = option(None, "Use at most this many training sequences.")
    max_eval_samples: int | None = option(None, "Use at most this many held-out sequences.")

    def __post_init__(self) -> None:
        check_minimum(self, 1, "vocab_size", "max_train_samples", "max_eval_samples", "num_proc")
        check_minimum(self, 0, "shuffle_buffer")
        if self.data_format not in (None, "text") and self.text_column is not None:
            raise ValueError(f"--text_column {self.text_column} contradicts --data_format {self.data_format}.")
        if self.streaming:
            self._check_streaming()

    def _check_streaming(self) -> None:
        if self.packing != "contiguous":
            raise ValueError(f"--packing {self.packing} needs the whole dataset: leave out --streaming.")
        if self.data_format not in (None, "text"):
            raise ValueError(f"--data_format {self.data_format} reads all rows at once: leave out --streaming.")
        if self.max_train_samples is not None:
            raise ValueError(
                f"--max_train_samples {self.max_train_samples} has no effect on a stream: leave it out and set "
                "--max_steps."
            )
        if self.max_eval_samples is None and self.validation_dataset is None:
            raise ValueError(
                "--streaming keeps the held-out sequences in memory: limit them with --max_eval_samples, or name "
                "them with --validation_dataset."
            )


@dataclass
class ModelArguments:
    """The network. A field that is not set takes the default of the model type, or the checkpoint's value."""

    model_type: str = option("bd3lm", "Model type, as in `AutoConfig.for_model`.")
    init_from: str | None = option(
        None, "Folder or hub name of weights to start from.", aliases=["--model_name_or_path"]
    )
    block_size: int | None = option(None, "Tokens per block; divides model_length.")
    model_length: int | None = option(None, "Tokens per training sequence.")
    hidden_dim: int | None = option(None, "Width of the residual stream.")
    n_blocks: int | None = option(None, "Number of transformer layers.")
    n_heads: int | None = option(None, "Number of attention heads.")
    cond_dim: int | None = option(None, "Width of the noise-level embedding.")
    dropout: float | None = option(None, "Dropout of the residual branches.")
    noise: str | None = option(None, "Noise schedule: loglinear, square, ... (paper, Table 8).")
    adaln: bool | None = option(None, "Adaptive layer norm.")
    time_conditioning: bool | None = option(None, "Feed the noise level to the network.")
    sampling_eps_min: float | None = option(None, "Lower end of the interval of noise levels.")
    sampling_eps_max: float | None = option(None, "Upper end of the interval of noise levels.")
    resample: bool | None = option(None, "Keep the mask rate of every block in the interval.")
    antithetic_sampling: str | None = option(None, "Stratification of the noise levels: shuffled, published or none.")
    noise_draws: int | None = option(
        None, "Noisy streams that share one clean stream in a step; the loss is their mean."
    )
    masking: str | None = option(None, "How a block is masked: independent, or exact_k, exactly k of its n tokens.")
    complementary: bool | None = option(None, "Pair each noisy stream with one that masks the other tokens.")
    mask_token_id: int | None = option(
        None, "Decoders to adapt: id of the mask token; by default chosen automatically."
    )
    alignment: str | None = option(
        None, "Decoders: which hidden state predicts a token: same, shifted or shifted_noisy."
    )
    context: str | None = option(None, "Decoders: whether the clean stream is causal by block or by token.")
    ar_loss_weight: float | None = option(None, "Decoders with context=token: weight of the next-token loss.")
    attn_implementation: str = option(
        "auto", "Attention kernel: eager, sdpa, flex_attention, or auto: flex_attention on CUDA, else sdpa."
    )
    num_denoising_steps: int | None = option(
        None, "Denoising steps per block in generation; saved in the generation config."
    )

    def __post_init__(self) -> None:
        check_minimum(self, 1, "num_denoising_steps")

    def config_fields(self) -> dict[str, Any]:
        """Return the configuration fields that were given, by name."""
        own = ("model_type", "init_from", "attn_implementation", "num_denoising_steps")
        return {name: value for name, value in asdict(self).items() if name not in own and value is not None}


@dataclass
class LoraArguments:
    """Low-rank adapters (LoRA): only small matrices next to frozen weights are trained."""

    lora_r: int | None = option(None, "Rank of the adapters; by default all weights train.")
    lora_alpha: int = option(16, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout in front of the adapters.")
    lora_target_modules: list[str] | None = option(
        None, "Names of the adapted layers, or all-linear; by default attention and MLP of every layer."
    )

    def __post_init__(self) -> None:
        check_minimum(self, 1, "lora_r", "lora_alpha")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"--lora_dropout {self.lora_dropout}: give a probability of at least 0 and below 1.")
        given = [item.name for item in fields(self)[1:] if getattr(self, item.name) != item.default]
        if self.lora_r is None and given:
            raise ValueError(f"--{given[0]} is given without --lora_r: set the rank of the adapters, for example 8.")


@dataclass
class IntervalSearchArguments:
    """The search for the interval of noise levels, at each evaluation; see `training/interval.py`."""

    interval_search: bool = option(
        False, "At each evaluation, adopt the interval of noise levels whose losses vary least."
    )
    interval_search_widths: list[float] | None = option(
        None, "Widths to search; by default the paper's, 0.5 to 0.9, unless interval_candidates is given."
    )
    interval_search_step: float = option(
        PUBLISHED_STEP, "Distance between lower ends of intervals of one width; by default the paper's 0.05."
    )
    interval_candidates: list[str] | None = option(
        None, "Custom intervals to compare with the whole one: 0.3-0.8 0.45-0.95."
    )
    interval_search_batches: int = option(100, "Held-out batches to measure on, each over all processes together.")
    interval_search_method: str = option(
        "shared", "shared: at most 12 noisy passes over a batch; published: one pass per interval.", choices=METHODS
    )
    interval_search_fixed: bool = option(False, "Search and log, but keep the current interval.")

    def interval_list(self, block_size: int) -> list[Interval]:
        """Return the candidate intervals for a block size, the whole interval first."""
        return candidate_intervals(
            block_size,
            widths=self.interval_search_widths,
            step=self.interval_search_step,
            own=[parse_interval(text) for text in self.interval_candidates or ()],
        )

    def _check_interval_search(self, *, evaluates: bool) -> None:
        self.interval_list(block_size=4)
        check_minimum(self, 1, "interval_search_batches")
        if self.interval_search and not evaluates:
            raise ValueError(
                "--interval_search true searches at each evaluation: set --eval_strategy to steps or epoch."
            )
        for item in fields(IntervalSearchArguments):
            if not self.interval_search and getattr(self, item.name) != item.default:
                raise ValueError(f"--{item.name} needs an interval search: add --interval_search true.")


_OWN_LOSS = "the loss is the model's own, and no other trains it to denoise"
_OWN_EVALUATION = "evaluation scores tokens by their likelihood and keeps no logits"
_OWN_ORDER = "the seed decides the order of the examples and their noise"

# Fields of TrainingArguments that would replace the loss or have no effect in our trainer, with the values that change
# nothing (the default first) and the reason to refuse all others.
REFUSED_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), _OWN_LOSS),
    "use_liger_kernel": ((False,), _OWN_LOSS),
    "liger_kernel_config": ((None,), _OWN_LOSS),
    "average_tokens_across_devices": ((True,), "a step divides its loss by the tokens of all processes"),
    "neftune_noise_alpha": ((None, 0.0), "a diffusion model adds only the noise of its schedule"),
    "prediction_loss_only": ((False,), _OWN_EVALUATION),
    "eval_do_concat_batches": ((True,), _OWN_EVALUATION),
    "eval_use_gather_object": ((False,), _OWN_EVALUATION),
    "eval_accumulation_steps": ((None,), _OWN_EVALUATION),
    "include_for_metrics": (([], None), _OWN_EVALUATION),
    "batch_eval_metrics": ((False,), _OWN_EVALUATION),
    "bf16_full_eval": ((False,), "evaluation runs in the precision of training (--bf16)"),
    "fp16_full_eval": ((False,), "evaluation runs in the precision of training (--fp16)"),
    "label_names": ((None, [], ["labels"]), "the labels are the column `labels`"),
    "group_by_length": ((False,), _OWN_ORDER),
    "train_sampling_strategy": (("random",), _OWN_ORDER),
    "length_column_name": (("length",), _OWN_ORDER),
    "dataloader_drop_last": ((False,), "the last step of an epoch is filled up, so no sequence is left out"),
    "dataloader_in_order": ((True,), _OWN_ORDER),
    "dataloader_multiprocessing_context": ((None,), "workers are started in torch's default way"),
    "auto_find_batch_size": ((False,), "another batch size is another run; set --per_device_train_batch_size"),
    "logging_nan_inf_filter": ((False,), "a loss that is not finite stops the run"),
    "debug": (("", None, []), "a loss that is not finite stops the run; transformers' hooks fail on empty tensors"),
    "enable_jit_checkpoint": ((False,), "--save_on_signal saves a checkpoint when the run is stopped"),
    "do_predict": ((False,), "score a saved model with `bd3lm eval`"),
}


@dataclass
class BD3LMTrainingArguments(IntervalSearchArguments, TrainingArguments):
    """transformers' `TrainingArguments` with the paper's optimisation as defaults (AdamW, 2,500 warm-up steps)."""

    output_dir: str = option("bd3lm-output", "Folder of the run.")
    overwrite_output_dir: bool = option(
        False, "Train into output_dir even if it has files; checkpoints of an earlier run are removed."
    )
    learning_rate: float = option(3e-4, "Peak learning rate.")
    lr_scheduler_type: str = option("constant_with_warmup", "Learning-rate schedule, as in transformers.")
    warmup_steps: float = option(2500, "Warm-up steps; a value below 1 is a share of all optimizer steps.")
    max_grad_norm: float = option(1.0, "Norm to which larger gradients are clipped.")
    logging_steps: float = option(50, "Log every this many optimizer steps.")
    # A non-finite loss stops the run (trainer.py); the filter would hide it from the log.
    logging_nan_inf_filter: bool = option(False, "Leave non-finite losses out of the log.")
    # All weights of our models take part in every step; looking for unused ones costs a walk through the graph.
    ddp_find_unused_parameters: bool | None = option(
        False, "Have DistributedDataParallel look for weights without a gradient."
    )
    block_size_schedule: str | None = option(
        None, "Block sizes with their steps, 1:500,4:500,16:0; the last one lasts until the end."
    )
    global_batch_size: int | None = option(
        None,
        "Sequences per optimizer step over all processes, such as the paper's 512; sets gradient_accumulation_steps.",
    )
    ema_decay: float | None = option(
        None, "Evaluate and save an exponential moving average of the weights; the paper's is 0.9999."
    )
    ema_warmup: bool = option(True, "Start the average with a lower decay, (1 + n) / (10 + n) in update n.")
    eval_estimator: str = option("stratified", "Likelihood estimator of evaluations: sampled, stratified or exact.")
    final_estimator: str | None = option(
        None, "Estimator of the likelihood before and after training; eval_estimator by default."
    )
    eval_num_samples: int = option(1, "Noise samples per held-out sequence.")
    sample_prompt: str = option("", "Prompt of the sample generated at each evaluation.")
    sample_tokens: int = option(64, "Tokens of that sample; 0 generates none.")
    sample_nucleus_p: float = option(0.9, "Nucleus probability for samples; 1 uses the whole distribution.")
    save_on_signal: bool = option(
        True, "On Ctrl-C or SIGTERM finish the step, save a checkpoint, exit with code 130 or 143."
    )
    peak_tflops: float | None = option(
        None, "Peak TFLOP/s of one device, for the utilisation (MFU); known for common NVIDIA GPUs."
    )

    def __post_init__(self) -> None:
        self._check_refused()
        if self.deepspeed is not None and not is_deepspeed_available():
            raise ValueError("--deepspeed: the package deepspeed is not installed. Run `pip install deepspeed`.")
        batches = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        check_minimum(self, 1, *batches)
        if self.block_size_schedule is not None:
            BlockSizeSchedule.parse(self.block_size_schedule)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and (parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()):
            # Processes without a GPU communicate through gloo, which transformers selects only with use_cpu.
            self.use_cpu = True
        # The run's precision must agree with the launcher's DeepSpeed configuration.
        precision = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and os.environ.get("ACCELERATE_MIXED_PRECISION")
        self.bf16 = self.bf16 or precision == "bf16"
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = self._accumulation(launched)
        has_accelerator_config = self.accelerator_config is not None
        for suffix in ("", "_kwargs"):  # newer versions of transformers warn about the name that all versions know
            if getattr(self, f"activation_checkpointing{suffix}", False) is None:
                setattr(self, f"activation_checkpointing{suffix}", getattr(self, f"gradient_checkpointing{suffix}"))
        super().__post_init__()
        if not has_accelerator_config:
            # Batches in pinned memory are copied to a GPU while it still works on the previous one.
            accelerator: Any = self.accelerator_config  # now an object of accelerate
            accelerator.non_blocking = self.dataloader_pin_memory
        if self.world_size != launched:
            raise ValueError(
                f"the launcher started {launched} processes but this run sees {self.world_size}, so each would train "
                f"alone: pass --use_cpu if the processes are meant to run on the CPU."
            )
        self._check_values()

    def _check_values(self) -> None:
        check_minimum(self, 1, "eval_num_samples")
        check_minimum(self, 0, "sample_tokens")
        if self.max_steps < 1 and not self.num_train_epochs > 0:
            raise ValueError(f"--num_train_epochs {self.num_train_epochs}: give a number above 0, or set --max_steps.")
        if not 0 < self.sample_nucleus_p <= 1:
            raise ValueError(f"--sample_nucleus_p {self.sample_nucleus_p}: expected a probability above 0, up to 1.")
        if self.torch_compile and torch.__version__ < "2.8":  # compared as versions, not as text
            raise ValueError(f"--torch_compile needs torch 2.8, and this is {torch.__version__}: leave it out.")
        self._check_hub()
        self._check_schedule()
        self._check_interval_search(evaluates=self.eval_strategy != IntervalStrategy.NO)
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"--peak_tflops {self.peak_tflops}: give a number above 0, or leave it out.")
        # transformers would only fail after the data is prepared. It does not check whether flyte is installed.
        installed = get_available_reporting_integrations()
        reporters: Any = self.report_to  # now a list
        if missing := set(reporters) - {*installed, "flyte"}:
            raise ValueError(
                f"--report_to {' '.join(sorted(missing))}: not installed, or not a reporter of transformers. Choose "
                f"from {', '.join([*installed, 'none'])}."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay {self.ema_decay}: give a number from 0 (no average) to below 1.")
        if getattr(self.accelerator_config, "split_batches", False):
            raise ValueError(
                "accelerator_config split_batches=True would give each process a part of per_device_train_batch_size: "
                "leave it out and set --global_batch_size."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"this process sees {self.n_gpu} GPUs, and each needs its own process: start them with `accelerate "
                f"launch training/train.py`, or choose one GPU with CUDA_VISIBLE_DEVICES=0."
            )

    def _check_schedule(self) -> None:
        """Create the learning-rate schedule once; transformers does so only after the data is prepared."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=max(0.0, self.learning_rate))
        constant = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
        try:
            if self.lr_scheduler_kwargs and self.lr_scheduler_type in constant:
                raise ValueError("it takes no arguments")
            steps = max(1, self.max_steps)
            warmup = self.get_warmup_steps(steps)
            options: Any = self.lr_scheduler_kwargs
            get_scheduler(self.lr_scheduler_type, optimizer, warmup, steps, options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"--lr_scheduler_kwargs {self.lr_scheduler_kwargs} does not fit --lr_scheduler_type "
                f"{SchedulerType(self.lr_scheduler_type).value}: {error}. Give arguments of that schedule."
            ) from error

    def _check_refused(self) -> None:
        for name, (accepted, reason) in REFUSED_FIELDS.items():
            # Some versions of transformers do not have the field.
            value = getattr(self, name, accepted[0])
            if value not in accepted:
                raise ValueError(f"--{name} {value} is not supported by this trainer: {reason}. Leave it out.")

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
        """Return the number of accumulated batches that make up `global_batch_size`."""
        requested, device = self.global_batch_size or 0, self.per_device_train_batch_size
        batch = processes * device
        if requested < 1 or requested % batch:
            nearest = max(1, round(requested / batch)) * batch
            raise ValueError(
                f"--global_batch_size {requested} is not a multiple of {processes} processes x "
                f"--per_device_train_batch_size {device}: the nearest that works is {nearest}."
            )
        steps = requested // batch
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps} contradicts --global_batch_size "
                f"{requested}, which takes {steps}: leave it out."
            )
        return steps
