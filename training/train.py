"""Train a block-diffusion language model: a recipe plus overrides.

python training/train.py                                    the demo: minutes on a CPU, nothing to download
python training/train.py recipe.yaml --max_steps 1000       a recipe, one field changed
accelerate launch training/train.py --dataset my.txt        on every GPU of this machine
"""

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast


_CHECKOUT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and (_CHECKOUT / "setup.cfg").is_file():
    # Run as a script: use the package of this checkout, even if another copy is installed.
    sys.path.insert(0, str(_CHECKOUT))
if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    from bd3lm_hf.training.command_help import train_help  # answers before torch is imported

    print(train_help())
    sys.exit()

import accelerate
import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers import pipeline, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging

import bd3lm_hf
from bd3lm_hf.console import one_line
from bd3lm_hf.data.streaming import PackedStream
from bd3lm_hf.evaluation.perplexity import HeldOutLoss, Perplexity, scored_token_ids, unigram_perplexity
from bd3lm_hf.evaluation.results import describe_estimator
from bd3lm_hf.reports.figures import write_training_curve
from bd3lm_hf.run_folder import (
    RECIPE_NAME,
    RESULTS_NAME,
    SAMPLES_NAME,
    SaveError,
    check_output_dir,
    checkpoint_to_resume,
    clear_output_dir,
    lock_output_dir,
    recover_output_dir,
)
from bd3lm_hf.tokenization import encode_prompt
from bd3lm_hf.training.arguments import BD3LMTrainingArguments, DataArguments
from bd3lm_hf.training.callbacks import SampleCallback, TrainingStopped, num_parameters, sample_text
from bd3lm_hf.training.command_line import RunArguments, parse_arguments, write_recipe
from bd3lm_hf.training.initial_model import check_lora, check_start, make_model, with_adapters
from bd3lm_hf.training.inputs import TrainingSequences, load_documents, make_sequences, make_tokenizer
from bd3lm_hf.training.interval import PLOT_NAME, SEARCH_NAME
from bd3lm_hf.training.trainer import BD3LMTrainer
from bd3lm_hf.user_files import write_atomically


logger = logging.get_logger("bd3lm_hf.train")

_FEW_HELD_OUT = 10
_SCORED_BEFORE = 100  # held-out sequences
_UNIGRAM_SEQUENCES = 100_000  # enough for token frequencies; a corpus may have millions


@dataclass
class TrainResult:
    """The outcome of a run; written to `results.json` in the output folder by the main process."""

    output_dir: str
    world_size: int
    global_batch_size: int
    steps: int
    seed: int
    losses: list[dict[str, float]] = field(default_factory=list)  # the trainer's log
    held_out: str = ""  # dataset and split of the scores
    estimator: str = ""  # of the scores: the exact likelihood, its bound, or an estimate of the bound
    before: Perplexity | HeldOutLoss | None = None
    after: Perplexity | HeldOutLoss | None = None
    unigram_perplexity: float | None = None
    text: str | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


def run(argv: Sequence[str]) -> TrainResult:
    """Parse, load, train, evaluate, report.

    Raises:
        ValueError: if the arguments, the data, the tokenizer or the checkpoint are invalid, or a loss or gradient is
            no longer finite; the message names the value and the remedy.
        TrainingStopped: if a signal stopped the run.
    """
    # 1. Arguments: a recipe plus overrides
    arguments = parse_arguments(argv)
    with locked_output_dir(arguments.training):
        return _run(arguments)


def _run(arguments: RunArguments) -> TrainResult:
    started = time.perf_counter()
    training = arguments.training
    with training.main_process_first(desc="looking for a checkpoint"):
        resume = requested_checkpoint(training)
    check_start(arguments.model)
    # With a checkpoint from another folder, this folder is that of a new run.
    continues = resume is not None and Path(resume).resolve().parent == Path(training.output_dir).resolve()
    check_output_dir(training.output_dir, overwrite=training.overwrite_output_dir, resume=continues)
    set_seed(training.seed)

    # 2. Text and tokenizer
    with training.main_process_first(desc="loading the text"):
        documents = load_documents(arguments.data)
    tokenizer = make_tokenizer(arguments, documents)

    # 3. Model, which needs the tokenizer's special tokens, and sequences of its length
    model = make_model(arguments.model, tokenizer)
    check_sample_prompt(training, model, tokenizer)
    if arguments.lora.lora_r is not None:
        check_lora(model, arguments.lora, arguments.model.init_from)
    sequences = make_sequences(arguments, documents, tokenizer, model.config)

    # 4. Train; nothing is written before this line
    trainer = make_trainer(arguments, model, tokenizer, sequences, fresh=not continues)
    estimator = training.final_estimator or training.eval_estimator
    if trainer.is_world_process_zero():
        print(summary_at_start(arguments, trainer, sequences, resume))
    trainer.check_estimator("final_estimator" if training.final_estimator else "eval_estimator")
    unigram = None
    with trainer.averaged_weights() as whole:  # in all processes, since each may hold only a part of the weights
        if trainer.is_world_process_zero() and model.has_likelihood:
            unigram = unigram_of(whole, sequences, training.eval_batch_size)
    before = score_before(trainer, sequences, estimator) if resume is None else None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except TrainingStopped:
        if trainer.state.global_step >= trainer.state.max_steps:  # the signal came too late to stop anything
            trainer.write_model(training.output_dir)
        raise
    trainer.write_model(training.output_dir)

    # 5. Evaluate
    after = trainer.score(sequences.validation, estimator=estimator)

    # 6. Report
    result = TrainResult(
        output_dir=training.output_dir,
        world_size=training.world_size,
        global_batch_size=trainer.get_total_train_batch_size(training),
        steps=trainer.state.global_step,
        seed=training.seed,
        losses=trainer.state.log_history,
        held_out=held_out_text(arguments.data),
        estimator=describe_estimator(estimator, training.eval_num_samples, bound=not model.exact_likelihood)
        if model.has_likelihood
        else "training loss",
        before=before,
        after=after,
        unigram_perplexity=unigram,
    )
    if trainer.is_world_process_zero():
        if training.sample_tokens:
            result.text = text_from_folder(training)
        result.seconds = time.perf_counter() - started
        report(result)
    if training.push_to_hub:
        trainer.push_to_hub()  # after the results, which the model card shows
    end(trainer)
    return result


@contextlib.contextmanager
def locked_output_dir(training: BD3LMTrainingArguments) -> Iterator[None]:
    """Lock the output folder against other runs. The main process holds the lock; all processes fail if it cannot."""
    with contextlib.ExitStack() as stack:
        # An exception in one process would leave the others waiting, so its message is sent to all.
        failure: list[str | None] = [None]
        if training.process_index == 0:
            try:
                stack.enter_context(lock_output_dir(training.output_dir))
            except (ValueError, OSError) as error:
                failure = [str(error)]
        broadcast_object_list(failure)
        if failure[0] is not None:
            raise ValueError(failure[0])
        yield


def end(trainer: BD3LMTrainer) -> None:
    """Leave the process group together. The wrapped model goes first: while it exists, a process may never exit."""
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    accelerator.free_memory()
    accelerator.end_training()


def make_trainer(
    arguments: RunArguments, model: Any, tokenizer: Any, sequences: TrainingSequences, *, fresh: bool
) -> BD3LMTrainer:
    """Create the output folder, which the run's recipe marks as ours, and return the trainer.

    Args:
        fresh: start again, and remove the checkpoints of an earlier run of ours.
    """
    training = arguments.training
    folder = Path(training.output_dir)
    if training.process_index == 0:
        # Results and samples of an earlier run would be mistaken for this one's.
        if fresh:
            clear_output_dir(folder)
            for name in (RESULTS_NAME, SAMPLES_NAME, SEARCH_NAME, PLOT_NAME):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(arguments, folder / RECIPE_NAME)
    if arguments.lora.lora_r is not None:
        start = arguments.model.init_from
        assert start is not None  # checked
        model = with_adapters(model, arguments.lora, start, tokenizer, training)
    trainer = BD3LMTrainer(
        model=model,
        args=training,
        train_dataset=sequences.train,
        eval_dataset=sequences.validation,
        processing_class=tokenizer,
        bytes_per_token=sequences.bytes_per_token,
    )
    if training.sample_tokens:
        trainer.add_callback(SampleCallback(tokenizer))
    return trainer


def check_sample_prompt(training: BD3LMTrainingArguments, model: Any, tokenizer: Any) -> None:
    """Refuse a `--sample_prompt` that `generate` would refuse at the first evaluation."""
    if not training.sample_prompt or not training.sample_tokens:
        return
    ids = encode_prompt(training.sample_prompt, tokenizer)
    if not ids or (getattr(model, "masks_text", False) and model.config.mask_token_id in ids):
        problem = "has the mask token, which only `bd3lm infill` fills" if ids else "has no tokens"
        raise ValueError(f"--sample_prompt {training.sample_prompt!r} {problem}: choose another text.")


def requested_checkpoint(training: BD3LMTrainingArguments) -> str | None:
    """Return the checkpoint of `--resume_from_checkpoint`: a folder, or the last one of the output folder for `true`.

    Raises:
        ValueError: if there is no such checkpoint, or it is incomplete.
    """
    requested = training.resume_from_checkpoint
    if requested is None or requested.lower() == "false":
        return None
    last = requested.lower() == "true"
    if last and training.process_index == 0:
        recover_output_dir(training.output_dir)
    try:
        return str(checkpoint_to_resume(last or requested, training.output_dir))
    except ValueError as error:
        raise ValueError(
            f"--resume_from_checkpoint {requested}: {error} Name a checkpoint folder, or leave the argument out "
            f"to start from the beginning."
        ) from None


def unigram_of(model: Any, sequences: TrainingSequences, batch_size: int) -> float:
    """Return the perplexity of a unigram model on the held-out tokens that the model is scored on."""
    if isinstance(sequences.train, PackedStream):
        rows = itertools.islice(sequences.train, _UNIGRAM_SEQUENCES // 100)  # training reads them again
    else:
        rows = sequences.train.select(range(min(len(sequences.train), _UNIGRAM_SEQUENCES)))
    train_ids = [label for row in rows for label in row["labels"] if label != -100]
    eval_ids = scored_token_ids(model, sequences.validation, batch_size=batch_size)
    return unigram_perplexity(train_ids, eval_ids, model.config.vocab_size)


def text_from_folder(training: BD3LMTrainingArguments) -> str:
    """Generate text as a user would: with a pipeline that loads the folder and runs the code saved there."""
    unset_hf_deepspeed_config()  # ZeRO-3 would shard the weights of every model that is loaded
    generator = pipeline("text-generation", model=training.output_dir, trust_remote_code=True)
    options: dict[str, Any] = {"prompt": training.sample_prompt, "max_new_tokens": training.sample_tokens}
    return sample_text(generator.model, generator.tokenizer, nucleus_p=training.sample_nucleus_p, **options)


# Before the first step


def summary_at_start(
    arguments: RunArguments, trainer: BD3LMTrainer, sequences: TrainingSequences, resume: str | None
) -> str:
    """Describe a run before its first step, and warn about a tiny held-out set."""
    training, data, model = arguments.training, arguments.data, trainer.model
    parameters, trained = num_parameters(model), num_parameters(model, only_trainable=True)
    length = model.config.model_length
    count = "a stream of" if isinstance(sequences.train, PackedStream) else f"{len(sequences.train):,}"
    batch = trainer.get_total_train_batch_size(training)
    precision = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    if training.max_steps > 0:
        steps = training.max_steps
    else:
        steps = round(training.num_train_epochs * -(-len(cast(Any, sequences.train)) // batch))
    start = resume or (
        f"the weights of {arguments.model.init_from}" if arguments.model.init_from else "random weights"
    )
    lines = {
        "model": f"{model.config.model_type}, {parameters:,} parameters"
        + ("" if trained == parameters else f", {trained:,} of them trained"),
        "text": f"{data.dataset}: {count} sequences of up to {length} tokens",
        "held out": f"{len(sequences.validation):,} sequences of {held_out_text(data)}",
        "steps": f"{steps:,} of {batch:,} sequences ({batch * length:,} tokens)",
        "device": f"{training.device}, {precision}, {training.world_size} process(es)",
        "from": start,
        "to": training.output_dir,
    }
    if len(sequences.validation) < _FEW_HELD_OUT:
        logger.warning(
            f"the held-out set has {len(sequences.validation)} sequence(s), too few for a reliable perplexity: name "
            f"more text with --validation_dataset."
        )
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def held_out_text(data: DataArguments) -> str:
    """Return the dataset and the split of the held-out text."""
    return data.validation_dataset or f"{data.dataset} (validation split)"


def score_before(trainer: BD3LMTrainer, sequences: TrainingSequences, estimator: str) -> Perplexity | HeldOutLoss:
    """Score 100 held-out sequences that are spread over the whole set, or all of them with `eval_on_start`.

    Each has the same noise as when the whole set is scored.
    """
    rows = sequences.validation
    count = len(rows) if trainer.args.eval_on_start else min(len(rows), _SCORED_BEFORE)
    return trainer.score(rows, estimator=estimator, indices=[i * len(rows) // count for i in range(count)])


# At the end


def report(result: TrainResult) -> None:
    """Write `results.json` and the training curve, and print the table and a sample."""
    result.versions = {module.__name__: module.__version__ for module in (bd3lm_hf, torch, transformers, accelerate)}
    content = asdict(result)
    for name in ("before", "after"):
        score = getattr(result, name)
        content[name] = None if score is None else score._asdict()
    folder = Path(result.output_dir)
    write_atomically(folder / RESULTS_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_training_curve(result.losses, folder, title=f"{folder.name}: {result.held_out}", results=content)
    print(table(result))
    if result.text is not None:
        print(f"\nText from the saved folder:\n{result.text}")
    print(f"\n{result.steps} steps in {result.seconds:.0f} s. Model, code and tokenizer are in {result.output_dir}")


def table(result: TrainResult) -> str:
    """Return the held-out perplexity (or loss) before and after training, next to the unigram baseline."""
    if isinstance(result.after, HeldOutLoss):
        return _table_of_losses(result)
    rows = [("held-out text", "perplexity", "bits/byte", "nll +- s.e.", "sequences")]
    for name, score in (("before training", result.before), ("after training", result.after)):
        if isinstance(score, Perplexity):
            bits = "" if score.bits_per_byte is None else f"{score.bits_per_byte:.3f}"
            nll = _with_error(score.nll, score.standard_error)
            rows.append((name, f"{score.perplexity:.1f}", bits, nll, f"{score.num_sequences:,}"))
    if result.unigram_perplexity is not None:
        rows.append(("unigram baseline", f"{result.unigram_perplexity:.1f}", "", "", ""))
    lines = [f"{name:<18}{ppl:>12}{bits:>12}{nll:>18}{count:>12}".rstrip() for name, ppl, bits, nll, count in rows]
    return "\n".join([*lines, f"({result.estimator}; {result.held_out})"])


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} +- {error:.3f}"


def _table_of_losses(result: TrainResult) -> str:
    lines = [f"{'held-out text':<18}{'loss +- s.e.':>18}"]
    for name, score in (("before training", result.before), ("after training", result.after)):
        if isinstance(score, HeldOutLoss):
            lines.append(f"{name:<18}{_with_error(score.loss, score.standard_error):>18}")
    lines.append(
        "No perplexity: this kind of model has no likelihood, and losses of different models cannot be compared. "
        "Score its samples with `bd3lm eval --generative`."
    )
    return "\n".join(lines)


# Command line


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Run with the command line's arguments; bad input ends in one line on stderr and exit code 2.

    `--log_level debug` adds the traceback.
    """
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(str(error) or "interrupted before the first step: nothing is saved.", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 130)) from None
    except (ValueError, OSError) as error:
        logger.debug("traceback", exc_info=True)
        # A single process may fail to save; any other error occurs in all of them.
        if int(os.environ.get("RANK", "0")) == 0 or isinstance(error, SaveError):
            print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
