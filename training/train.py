"""Train a block-diffusion language model: a recipe plus overrides.

python training/train.py                                    the demo: minutes on a CPU, nothing to download
python training/train.py recipe.yaml --max_steps 1000       a recipe, one field changed
accelerate launch training/train.py --dataset my.txt        on every GPU of this machine
"""

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


_CHECKOUT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and (_CHECKOUT / "setup.cfg").is_file():
    # Run as a script: use the package this script belongs to, whether or not it, or another copy, is installed.
    sys.path.insert(0, str(_CHECKOUT))

import accelerate
import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, pipeline, set_seed
from transformers.utils import logging

import bd3lm_hf
from bd3lm_hf.checkpoints import adapter_base, add_adapters, read_config
from bd3lm_hf.data.streaming import PackedStream
from bd3lm_hf.evaluation.perplexity import HeldOutLoss, Perplexity, count_scored_tokens, unigram_perplexity
from bd3lm_hf.output_files import write_atomically
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
from bd3lm_hf.tokenization import check_tokenizer_fits
from bd3lm_hf.training.arguments import BD3LMTrainingArguments, ModelArguments
from bd3lm_hf.training.callbacks import SampleCallback, write_text
from bd3lm_hf.training.command_line import RunArguments, parse_arguments, write_recipe
from bd3lm_hf.training.curves import write_training_curve
from bd3lm_hf.training.initial_model import check_shape, start_around, start_from
from bd3lm_hf.training.inputs import TrainingSequences, load_documents, make_sequences, make_tokenizer
from bd3lm_hf.training.interval import PLOT_NAME, SEARCH_NAME
from bd3lm_hf.training.trainer import BD3LMTrainer


logger = logging.get_logger("bd3lm_hf.train")


_UNIGRAM_SEQUENCES = 100_000  # enough for word frequencies; a corpus may have millions


@dataclass
class TrainResult:
    """What a run did; written to `results.json` in the output folder by the main process."""

    output_dir: str
    world_size: int
    global_batch_size: int
    steps: int
    seed: int
    losses: list[dict[str, float]] = field(default_factory=list)  # the trainer's log
    before: Perplexity | HeldOutLoss | None = None
    after: Perplexity | HeldOutLoss | None = None
    unigram_perplexity: float | None = None
    text: str | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


def run(argv: Sequence[str]) -> TrainResult:
    """Parse, load, train, evaluate, report.

    Raises:
        ValueError: anything wrong with the arguments, the data, the tokenizer or the checkpoint, or numbers that are
            no longer finite; the message names the value and the remedy.
    """
    # 1. Arguments: a recipe plus overrides
    arguments = parse_arguments(argv)
    with locked_output_dir(arguments.training):
        return _run(arguments)


def _run(arguments: RunArguments) -> TrainResult:
    started = time.perf_counter()
    training = arguments.training
    with training.main_process_first(desc="looking for a checkpoint"):
        resume = wanted_checkpoint(training)
    if arguments.model.init_from is not None:
        check_shape(arguments.model.init_from, arguments.model.config_fields())
    # A checkpoint of another folder is gone on with here as in any new folder.
    goes_on = resume is not None and Path(resume).resolve().parent == Path(training.output_dir).resolve()
    check_output_dir(training.output_dir, overwrite=training.overwrite_output_dir, resume=goes_on)
    set_seed(training.seed)

    # 2. Text and tokenizer
    with training.main_process_first(desc="loading the text"):
        documents = load_documents(arguments.data)
    tokenizer = make_tokenizer(arguments, documents)

    # 3. Model, which knows the tokenizer's special tokens, and sequences of its length
    model = make_model(arguments.model, tokenizer)
    if arguments.lora.lora_r is not None:
        model = adapt(model, arguments)
    sequences = make_sequences(arguments, documents, tokenizer, model.config)

    # 4. Train. Nothing is written before this line
    trainer = make_trainer(arguments, model, tokenizer, sequences, fresh=not goes_on)
    estimator = training.final_estimator or training.eval_estimator
    before = trainer.score(sequences.validation, estimator=estimator) if resume is None else None
    # Now that every process has the whole model; training may spread its weights over them.
    unigram = None
    if trainer.is_world_process_zero() and model.has_likelihood:
        unigram = unigram_of(model, sequences, training.eval_batch_size)
    trainer.train(resume_from_checkpoint=resume)
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
        before=before,
        after=after,
        unigram_perplexity=unigram,
    )
    if trainer.is_world_process_zero():
        if training.sample_tokens:
            result.text = text_from_folder(training.output_dir, training.sample_prompt, training.sample_tokens)
        result.seconds = time.perf_counter() - started
        report(result)
    if training.push_to_hub:
        trainer.push_to_hub()  # with the results in its card
    end(trainer)
    return result


@contextlib.contextmanager
def locked_output_dir(training: BD3LMTrainingArguments) -> Iterator[None]:
    """Keep other runs out of the output folder. The main process holds the lock; all of them fail if it cannot."""
    with contextlib.ExitStack() as stack:
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
    """Leave the process group together, after what still holds it: a wrapped model that outlives it may never exit."""
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    accelerator.free_memory()
    accelerator.end_training()


def make_trainer(
    arguments: RunArguments, model: Any, tokenizer: Any, sequences: TrainingSequences, *, fresh: bool
) -> BD3LMTrainer:
    """The trainer, and the folder it writes to, marked as ours by the run's recipe.

    Args:
        fresh: start anew; checkpoints of an earlier run of ours are removed.
    """
    training = arguments.training
    folder = Path(training.output_dir)
    if training.process_index == 0:
        if fresh:
            clear_output_dir(folder)
            for name in (RESULTS_NAME, SAMPLES_NAME, SEARCH_NAME, PLOT_NAME):
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(arguments, folder / RECIPE_NAME)
    trainer = BD3LMTrainer(
        model=model,
        args=training,
        train_dataset=sequences.train,
        eval_dataset=sequences.validation,
        processing_class=tokenizer,
        bytes_per_token=sequences.bytes_per_token,
    )
    if training.sample_tokens:
        prompt, tokens = training.sample_prompt, training.sample_tokens
        sampler = SampleCallback(tokenizer, prompt=prompt, max_new_tokens=tokens, path=folder / SAMPLES_NAME)
        trainer.add_callback(sampler)
    return trainer


def wanted_checkpoint(training: BD3LMTrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: a folder, or the last one of the output folder for `true`.

    Raises:
        ValueError: there is none that is complete.
    """
    wanted = training.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    last = wanted.lower() == "true"
    if last and training.process_index == 0:
        recover_output_dir(training.output_dir)
    try:
        return str(checkpoint_to_resume(last or wanted, training.output_dir))
    except ValueError as error:
        raise ValueError(
            f"--resume_from_checkpoint {wanted}: {error} Name a checkpoint folder, or leave the argument out to start "
            f"anew."
        ) from None


def make_model(arguments: ModelArguments, tokenizer: Any) -> Any:
    """A new model of the wanted type, or a checkpoint's with its fields overridden.

    Raises:
        ValueError: unknown model type, weights that are missing, unexpected or not finite, or special tokens that
            contradict the tokenizer's.
    """
    keywords: dict[str, Any] = {}
    if arguments.attn_implementation is not None:
        keywords["attn_implementation"] = arguments.attn_implementation
    if arguments.init_from is not None:
        model = start(arguments.model_type, arguments.init_from, tokenizer, arguments.config_fields(), **keywords)
    else:
        special = {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")
        }
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        config = new_config(arguments.model_type, vocab_size=vocab_size, **special, **arguments.config_fields())
        model = AutoModelForCausalLM.from_config(config, **keywords)
    check_tokenizer_fits(tokenizer, model.config)
    if arguments.num_denoising_steps is not None:
        model.generation_config.num_denoising_steps = arguments.num_denoising_steps
    return model


def start(model_type: str, name: str, tokenizer: Any, fields: dict[str, Any], **keywords: Any) -> Any:
    """The model of a checkpoint, or a new one around it, where `--model_type` is built on a foreign encoder."""
    head = model_class(model_type)
    if hasattr(head, "from_encoder") and not isinstance(read_config(name, argument="--init_from"), head.config_class):
        return start_around(head, name, tokenizer, fields, **keywords)
    return start_from(name, tokenizer, fields, **keywords)


def adapt(model: Any, arguments: RunArguments) -> Any:
    """The loaded model with adapters.

    Raises:
        ValueError: a new model, whose weights would stay as they were drawn; one that is made of an adapter, whose
            name would stand for its base alone; or another block size, which an adapter can not tell its readers.
    """
    lora, start = arguments.lora, arguments.model.init_from
    assert lora.lora_r is not None
    if start is None:
        raise ValueError(f"--lora_r {lora.lora_r} adapts a trained model: name one with --init_from.")
    if adapter_base(start) is not None:
        raise ValueError(
            f"--lora_r {lora.lora_r} would adapt the adapter {start}, and an adapter names one base model: save the "
            f"merged model first (PeftModel.merge_and_unload), or leave out --lora_r to train all its weights."
        )
    block_size = read_config(start).block_size
    if block_size != model.config.block_size:
        raise ValueError(
            f"--block_size {model.config.block_size} with --lora_r: an adapter is used with the configuration of "
            f"{start}, whose block_size is {block_size}. Train all weights at the new size first, or leave it out."
        )
    return add_adapters(
        model,
        rank=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        targets=lora.lora_target_modules,
    )


def new_config(model_type: str, **fields: Any) -> Any:
    """The configuration of a new model."""
    return config_class(model_type)(**fields)


def config_class(model_type: str) -> Any:
    """The class of the configurations of a type.

    Raises:
        ValueError: there is no such type.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"--model_type {model_type} is unknown: try --model_type bd3lm.")
    return CONFIG_MAPPING[model_type]


def model_class(model_type: str) -> Any:
    """The class of the models of a type; None where no text can be generated with it."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class(model_type), None)


def unigram_of(model: Any, sequences: TrainingSequences, batch_size: int) -> float:
    """Perplexity of word frequencies on the same held-out tokens that the model is scored on."""
    if isinstance(sequences.train, PackedStream):
        rows = itertools.islice(sequences.train, _UNIGRAM_SEQUENCES // 100)  # to be read once more
    else:
        rows = sequences.train.select(range(min(len(sequences.train), _UNIGRAM_SEQUENCES)))
    train_ids = [label for row in rows for label in row["labels"] if label != -100]
    eval_ids = count_scored_tokens(model, sequences.validation, batch_size=batch_size)
    return unigram_perplexity(train_ids, eval_ids, model.config.vocab_size)


def text_from_folder(folder: str, prompt: str, max_new_tokens: int) -> str:
    """Write text as a user of the folder would: through the pipeline, with the code that was saved beside it."""
    set_seed(0)
    generator = pipeline("text-generation", model=folder, trust_remote_code=True)
    if not prompt:
        return write_text(generator.model, generator.tokenizer, max_new_tokens=max_new_tokens)
    return generator(prompt, max_new_tokens=max_new_tokens, do_sample=True)[0]["generated_text"]


def report(result: TrainResult) -> None:
    """Write `results.json` and print what a reader wants to know."""
    result.versions = {module.__name__: module.__version__ for module in (bd3lm_hf, torch, transformers, accelerate)}
    content = asdict(result)
    for name in ("before", "after"):
        score = getattr(result, name)
        content[name] = None if score is None else score._asdict()
    folder = Path(result.output_dir)
    write_atomically(folder / RESULTS_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_training_curve(result.losses, folder, title=folder.name)
    print(table(result))
    if result.text is not None:
        print(f"\nText from the saved folder:\n{result.text}")
    print(f"\n{result.steps} steps in {result.seconds:.0f} s. Model, code and tokenizer are in {result.output_dir}")


def table(result: TrainResult) -> str:
    """Held-out perplexity before and after training, beside the unigram baseline; or the loss, where there is none."""
    if isinstance(result.after, HeldOutLoss):
        return _table_of_losses(result)
    rows = [("held-out text", "perplexity", "bits/byte", "nll +- s.e.")]
    for name, score in (("before training", result.before), ("after training", result.after)):
        if isinstance(score, Perplexity):
            bits = "" if score.bits_per_byte is None else f"{score.bits_per_byte:.3f}"
            rows.append((name, f"{score.perplexity:.1f}", bits, f"{score.nll:.3f} +- {score.standard_error:.3f}"))
    if result.unigram_perplexity is not None:
        rows.append(("unigram baseline", f"{result.unigram_perplexity:.1f}", "", ""))
    return "\n".join(f"{name:<18}{ppl:>12}{bits:>12}{error:>18}".rstrip() for name, ppl, bits, error in rows)


def _table_of_losses(result: TrainResult) -> str:
    lines = [f"{'held-out text':<18}{'loss +- s.e.':>18}"]
    for name, score in (("before training", result.before), ("after training", result.after)):
        if isinstance(score, HeldOutLoss):
            lines.append(f"{name:<18}{f'{score.loss:.3f} +- {score.standard_error:.3f}':>18}")
    lines.append(
        "There is no perplexity: this kind of model has no likelihood, and its loss compares with no other model's. "
        "Judge its texts."
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Run with the command line's arguments; bad input ends in one line on stderr and exit code 2.

    `--log_level debug` adds the traceback.
    """
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        logger.debug("traceback", exc_info=True)
        # A process may be alone with its failure to save; everything else happens to all of them.
        if accelerate.PartialState().is_main_process or isinstance(error, SaveError):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
