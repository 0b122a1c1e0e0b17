"""Runs in two processes on the CPU, started once for all tests that look at them (fixture `two_processes`).

accelerate turns an FSDP configuration into DDP on a CPU, although torch shards there too. `ShardedTrainer` tells it
otherwise, so that its own way of wrapping a model, the Trainer's way of using that, and ours are all tested.
"""

import os
import shutil
import socket
import time
from pathlib import Path

import torch
import torch.multiprocessing
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from decoders import random_ids, tiny_decoder
from shared_models import TINY, randomized
from tiny_runs import losses_of, rows_of, save_recipe
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from bd3lm_hf import cli
from bd3lm_hf.checkpoints import NotFiniteError, check_finite_weights
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.tokenization import train_tokenizer
from bd3lm_hf.training import train as train_script
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.callbacks import SampleCallback
from bd3lm_hf.training.ema import has_shards, local_part, prepare_fsdp, whole
from bd3lm_hf.training.examples import NOISE, noise_of_examples
from bd3lm_hf.training.train import TrainResult, run
from bd3lm_hf.training.trainer import BD3LMTrainer


STEPS, BATCH, SECONDS = 4, 8, 500
DECODERS = ("gpt2", "llama")  # with one matrix for embedding and head, and with two


def tiny_model() -> BD3LMForMaskedLM:
    return randomized(BD3LMForMaskedLM(BD3LMConfig(**{**TINY, "hidden_dim": 16, "cond_dim": 8})), std=0.2)


class Words:
    """A tokenizer for text samples that start from nothing."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, list(ids)))


class ShardedTrainer(BD3LMTrainer):
    """The trainer as under training/launch/fsdp2.yaml, on a CPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        # Both, as accelerate does: its states copy one another.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", reshard_after_forward=True
        )
        if self.args.bf16:
            state.fsdp_plugin.set_mixed_precision("bf16")
        prepare_fsdp(state.fsdp_plugin)
        self.is_fsdp_enabled = True


def train(folder: Path, trainer_class: type[BD3LMTrainer] = BD3LMTrainer, resume: str | None = None, **arguments):
    """Four steps with an average of the weights; an evaluation, a search, a sample and a checkpoint after each two.

    Returns what the model saw and what came out.
    """
    AcceleratorState._reset_state()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = {"global_batch_size": BATCH, "per_device_eval_batch_size": BATCH // processes, "max_steps": STEPS}
    # Adam's division by the gradient's size would blow rounding up.
    defaults |= {"optim": "sgd", "learning_rate": 0.1, "warmup_steps": 0, "ema_decay": 0.9, "seed": 5}
    defaults |= {"interval_search": True, "sample_tokens": 5, "logging_steps": 1, "eval_strategy": "steps"}
    defaults |= {"eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    training = BD3LMTrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    model, seen, dtypes = tiny_model(), {}, set()
    trainer = trainer_class(model=model, args=training, train_dataset=rows_of(16), eval_dataset=rows_of(5, seed=1))
    trainer.add_callback(SampleCallback(Words()))

    def record(module, positional, named) -> None:
        if "labels" in named:
            dtypes.update(named[name].dtype for name in NOISE)
            for row, ids in enumerate(named["input_ids"].tolist()):
                seen[trainer.state.global_step, tuple(ids)] = {name: named[name][row].clone() for name in NOISE}

    model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return {
        "world_size": training.world_size,
        "accumulation": training.gradient_accumulation_steps,
        "sharded": has_shards(trainer.model),
        "interval": model.interval(),
        "seen": seen,
        "dtypes": dtypes,
        "average": {name: whole(x, trainer.average.parameters[name]) for name, x in trainer.average.shadows.items()},
        **{key: losses_of(trainer, key) for key in ("loss", "eval_nll", "grad_norm")},
    }


def run_recipes(recipe: Path, folder: Path, processes: int) -> dict[str, TrainResult]:
    """Run the training script as one of several processes: on rows, on a stream, and resumed half-way."""
    common = [str(recipe), "--optim", "sgd", "--learning_rate", "0.1", "--use_cpu"]
    rows = [*common, "--output_dir", str(folder / "rows"), "--global_batch_size", "8", "--ema_decay", "0.9"]
    rows += ["--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--interval_search", "true"]
    rows += ["--per_device_eval_batch_size", str(4 // processes)]
    stream = [*common, "--output_dir", str(folder / "stream"), "--streaming", "true", "--shuffle_buffer", "5"]
    stream += ["--per_device_train_batch_size", str(8 // processes), "--lr_scheduler_type", "constant"]
    stream += ["--max_steps", "5", "--save_strategy", "steps", "--save_steps", "2"]
    results = {"rows": run(rows), "stream": run(stream)}
    if processes > 1:
        torch.distributed.barrier()
    for name in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(folder / "stream" / name, ignore_errors=True)
    if processes > 1:
        torch.distributed.barrier()
    return results | {"resumed": run([*stream, "--resume_from_checkpoint", "true"])}


def shard_by_hand(model: PreTrainedModel, *modules: torch.nn.Module) -> None:
    """torch's own `fully_shard`, each of the modules by itself."""
    mesh = init_device_mesh("cpu", (2,))
    for module in (*modules, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "token_nll")


def one_pass(model: PreTrainedModel, rows: slice, processes: int, ids: torch.Tensor) -> torch.Tensor:
    """Loss and gradients of some of eight sequences; over two processes the means are those of all."""
    length = ids.shape[1]
    noise = noise_of_examples(range(BATCH), seed=0, group_size=BATCH, num_blocks=length // 4, length=length)
    given = {name: getattr(noise, name)[rows] for name in NOISE}
    loss = model.train()(ids[rows], labels=ids[rows], num_items_in_batch=ids.numel() / processes, **given).loss
    loss.backward()
    return loss.detach()


def scores(model: BD3LMForMaskedLM) -> torch.Tensor:
    ids = torch.tensor(rows_of(3, seed=1)["input_ids"])
    return model.eval().token_nll(ids, estimator="sampled", generator=torch.Generator().manual_seed(0)).nll


def refusal(rank: int) -> str:
    """Return the error that every process raises when the part of one holds a NaN."""
    model = tiny_model()
    shard_by_hand(model, *model.backbone.blocks, model.get_output_embeddings())
    local_part(model.backbone.blocks[0].attn_qkv.weight)[0, 0] = float("nan" if rank else 1.0)
    try:
        check_finite_weights(model, "a shard")
    except NotFiniteError as error:
        return str(error)
    return ""


def decoder(family: str) -> PreTrainedModel:
    """A decoder whose loss reads both streams, which are aligned by the clean one."""
    return tiny_decoder(family, context="token", ar_loss_weight=0.5, alignment="shifted")


def decoder_by_hand(rank: int, family: str) -> dict:
    model = decoder(family)
    shard_by_hand(model, *(model.base_model.h if family == "gpt2" else model.base_model.layers))
    loss = one_pass(model, slice(rank * 4, rank * 4 + 4), 2, random_ids(BATCH))
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"loss": loss, "gradients": gradients, "nll": model.eval().token_nll(random_ids(2), estimator="exact").nll}


def save_scored(folder: Path) -> None:
    """A model with its tokenizer, and a text for it."""
    lines = "".join(f"Line {number} of a text that two processes share.\n" for number in range(120))
    (folder / "text.txt").write_text(lines)
    tokenizer = train_tokenizer([lines], vocab_size=300)
    sizes = {"block_size": 4, "model_length": 32, "hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2}
    config = BD3LMConfig(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, **sizes)
    randomized(BD3LMForMaskedLM(config), std=0.2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def evaluation_of(folder: Path, output: Path, *arguments: str) -> list[str]:
    """The arguments of `bd3lm` that score the text."""
    given = ["--model", str(folder / "model"), "--dataset", str(folder / "text.txt"), "--split", "train"]
    return ["eval", *given, "--device", "cpu", "--batch-size", "3", "--output", str(output), *arguments]


def work(rank: int, port: int, folder: str) -> None:
    """Everything one process does."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    out = Path(folder)
    # A run would end the process group, on which the next one goes on.
    train_script.end = lambda trainer: trainer.accelerator.wait_for_everyone()
    results = {
        "recipes": run_recipes(out / "tiny.yaml", out / "recipes", 2),
        "ddp": train(out / "ddp", per_device_train_batch_size=4),
        "fsdp": train(out / "fsdp", ShardedTrainer, per_device_train_batch_size=2),
        "resumed": train(out / "resumed", ShardedTrainer, f"{out}/fsdp/checkpoint-2", per_device_train_batch_size=2),
        "bf16": train(out / "bf16", ShardedTrainer, per_device_train_batch_size=4, max_steps=1, bf16=True),
        "not finite": refusal(rank),
        "decoders": {family: decoder_by_hand(rank, family) for family in DECODERS},
        "eval": [
            cli.main(evaluation_of(out, out / f"eval-{estimator}.json", "--estimator", estimator))
            for estimator in ("published", "stratified")
        ],
    }
    if rank == 0:  # as an interrupted run leaves it; the other process has to continue it too
        lines = (out / "eval-stratified.scores.jsonl").read_text().splitlines(keepends=True)
        (out / "eval-resumed.scores.jsonl").write_text("".join(lines[:3]))
    torch.distributed.barrier()
    results["eval"].append(cli.main(evaluation_of(out, out / "eval-resumed.json", "--estimator", "stratified")))
    torch.save(results, out / f"results-{rank}.pt")
    torch.distributed.destroy_process_group()


def run_two_processes(folder: Path) -> None:
    """Start both processes and wait for them; each saves its results."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    save_scored(folder)
    save_recipe(folder)
    # Both are forks of a process that imports everything once.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["two_processes"])
    context = torch.multiprocessing.start_processes(
        work, (port, str(folder)), nprocs=2, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + SECONDS
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"two processes were not done after {SECONDS} s: they may wait for each other.")


def results_of(folder: Path) -> tuple[dict, dict]:
    """The results of both processes."""
    return tuple(torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(2))
