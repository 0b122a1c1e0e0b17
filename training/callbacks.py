"""Callbacks of a run: speed and utilisation (MFU), samples, stopping on signals, and exact resuming."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from bd3lm_hf.generation.text_generation import generate_batch
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.loss_bd3lm import mean_move_chance
from bd3lm_hf.run_folder import SAMPLE_HEAD, SAMPLES_NAME
from bd3lm_hf.tokenization import encode_prompt
from bd3lm_hf.user_files import write_atomically


# Dense bfloat16 TFLOP/s with float32 accumulation, from the vendors' data sheets. The first entry whose words are all
# in the name of the device is used.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 149.7,
    "A10": 125.0,
    "RTX A6000": 154.8,
    "RTX A5000": 111.1,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def num_parameters(model: nn.Module, *, only_trainable: bool = False) -> int:
    """Count the parameters of a model, including those that DeepSpeed ZeRO-3 replaces with empty tensors."""
    parameters = [p for p in model.parameters() if p.requires_grad or not only_trainable]
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def forward_flops(
    config: BD3LMConfig, length: int, masked: float, *, num_noise_samples: int = 1
) -> tuple[float, float]:
    """Return the operations of the training forward pass over one sequence: those of weights, and those of attention.

    A multiplication and an addition count as two. Only what the mathematics needs is counted: no recomputation by
    gradient checkpointing, and only the attention pairs that the block-causal masks allow. The clean stream skips the
    last layer's queries and MLP, and the head. In the noisy stream only masked positions pass through the last layer's
    output projection and MLP, and the head. Embeddings, norms and adaLN are not counted.

    Args:
        length: tokens of the sequence.
        masked: masked tokens of a noisy stream, or their expectation.
        num_noise_samples: noisy streams per clean stream.
    """
    width, layers = config.hidden_dim, config.n_blocks
    both, noisy, masked = (1 + num_noise_samples) * length, num_noise_samples * length, num_noise_samples * masked
    # A layer has 12 width^2 weights: 3 for queries, keys and values, 1 for the output projection, 8 for the MLP.
    weights: float = (layers - 1) * both * 12 * width**2
    weights += (2 * both + noisy + 9 * masked) * width**2 + masked * width * config.vocab_size
    pairs = attended_pairs(length, config.block_size)
    # Two products of width `width` for each pair: scores, and the weighted sum of values.
    attention = ((layers - 1) * (1 + num_noise_samples) + num_noise_samples) * pairs * 2 * width
    return 2.0 * weights, 2.0 * attention


def attended_pairs(length: int, block_size: int) -> int:
    """Return the number of query-key pairs of one stream. In either stream a token sees its block and earlier ones."""
    blocks, rest = divmod(length, block_size)
    return block_size**2 * blocks * (blocks + 1) // 2 + rest * length


def training_flops(model: Any, batch: int, length: int) -> int | None:
    """Return the operations of forward and backward pass over `batch` sequences; None for other architectures.

    A backward pass repeats the forward's operations once for the gradient of the inputs and once for that of the
    trained weights. The number of masked tokens is its expectation over the model's current interval of noise levels.
    """
    config = model.config
    if type(config) is not BD3LMConfig:  # a wrapped model has the same class, other architectures a subclass
        return None
    masked = mean_move_chance(config.noise, *model.interval()) * length
    weights, attention = forward_flops(config, length, masked, num_noise_samples=config.noise_draws)
    trained_share = num_parameters(model, only_trainable=True) / max(1, num_parameters(model))
    return round(batch * ((2 + trained_share) * weights + 3 * attention))


def peak_tflops_of(device_name: str) -> float:
    """Return the peak bfloat16 TFLOP/s of a GPU by its name, such as `NVIDIA A100-SXM4-80GB`; 0 if unknown."""
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in _PEAK_TFLOPS.items() if set(name.split()) <= set(words)), 0.0)


class SpeedMeter(TrainerCallback):
    """Measure the speed of training over all processes; time spent in evaluation and saving does not count.

    Args:
        peak_flops: floating-point operations per second of all devices together; 0 if unknown.
    """

    def __init__(self, peak_flops: float = 0.0) -> None:
        self.peak_flops = peak_flops
        self.tokens = 0  # the trainer adds those of each micro-batch
        self.flops = 0.0  # likewise
        self.seconds = 0.0
        self.started: float | None = None

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started

    def since_last_log(self) -> dict[str, float]:
        """Return means since the last call: `tokens_per_second`, rounded to whole tokens, and `tflops_per_second`.

        If the peak is known, also `mfu`, the share of it that is used. Empty before the first step.
        """
        if not self.seconds:
            return {}
        speed = {"tokens_per_second": float(round(self.tokens / self.seconds))}
        if self.flops:
            speed["tflops_per_second"] = float(f"{self.flops / self.seconds / 1e12:.4g}")
        if self.flops and self.peak_flops:
            speed["mfu"] = float(f"{self.flops / self.seconds / self.peak_flops:.4g}")
        self.tokens, self.flops, self.seconds = 0, 0.0, 0.0
        return speed


def sample_text(
    model: Any, tokenizer: Any, *, prompt: str = "", max_new_tokens: int = 64, nucleus_p: float = 1.0, seed: int = 0
) -> str:
    """Continue `prompt`, or start a new text if it is empty; torch's random state does not change.

    Returns:
        prompt and continuation, without special tokens.
    """
    name = "nucleus_p" if hasattr(model.generation_config, "nucleus_p") else "top_p"
    nucleus: dict[str, Any] = {name: nucleus_p}
    # An unprompted sample begins as training documents do.
    ids = encode_prompt(prompt, tokenizer) if prompt else [model.generation_config.bos_token_id]
    was_training = model.training
    model.eval()
    try:
        (text,) = generate_batch(
            model,
            [ids],
            max_new_tokens,
            seeds=[seed],
            stop_at_eos=True,
            do_sample=True,
            # Only one process generates: its weights are whole, even if training shards them over processes.
            synced_gpus=False,
            **nucleus,
        )
    finally:
        model.train(was_training)
    return tokenizer.decode(text.ids, skip_special_tokens=True)


class TrainingStopped(KeyboardInterrupt):
    """A signal stopped the run, after a checkpoint was saved.

    Args:
        signum: the signal; the exit code of the program is 128 + signum.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = int(signum)

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, as in a shell."""
        return 128 + self.signum


class SignalCallback(TrainerCallback):
    """End training on SIGINT or SIGTERM after the current step, with a checkpoint; a second signal ends it at once.

    Signals reach processes at different moments, so the trainer sets `agreed` for all of them at the same step.
    """

    # Launchers forward a signal that the terminal has already sent. That copy is not the user's second signal.
    _COPY_SECONDS = 3.0

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed = False
        self._received_at = 0.0
        self._handlers: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Install the handlers, in the main thread only."""
        self.received, self.agreed, pid = None, False, os.getpid()

        def receive(signum: int, frame: Any) -> None:
            if os.getpid() != pid:
                return  # a data loader's worker, which the current step still needs
            if self.received is None:
                self.received, self._received_at = signum, time.monotonic()
                if state.is_world_process_zero:
                    name = signal.Signals(signum).name
                    tqdm.write(
                        f"{name}: a checkpoint is saved after this step; repeat it to stop at once.", sys.stderr
                    )
            elif time.monotonic() - self._received_at > self._COPY_SECONDS:
                self.restore()
                signal.raise_signal(signum)

        # Python lets no other thread set signal handlers.
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._handlers[signum] = signal.signal(signum, receive)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Save and stop, if a process received a signal."""
        if self.agreed:
            control.should_save = control.should_training_stop = True
        return control

    def restore(self) -> None:
        """Restore the previous handlers."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}


class SampleCallback(TrainerCallback):
    """Generate a sample at each evaluation, and write it to the terminal and to `samples.txt` in the run's folder."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Generate one sample, with the same seed each time, so that samples of different steps are comparable."""
        if not state.is_world_process_zero:
            return
        text = sample_text(
            kwargs["model"],
            self.tokenizer,
            prompt=args.sample_prompt,
            max_new_tokens=args.sample_tokens,
            nucleus_p=args.sample_nucleus_p,
            seed=args.seed,
        )
        entry = f"--- sample at step {state.global_step} ---\n{text}\n"
        tqdm.write(entry)
        path = Path(args.output_dir, SAMPLES_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
        # A resumed run repeats the samples after its checkpoint.
        repeated = (head.start() for head in SAMPLE_HEAD.finditer(earlier) if int(head[1]) >= state.global_step)
        write_atomically(path, earlier[: next(repeated, None)] + entry)


class RunningLoss:
    """Sum the losses of optimizer steps: since the last log, and since the start of the run.

    transformers loses the sum since the last log when a run is resumed. The first loss of its log would then differ
    from that of the uninterrupted run wherever a save does not coincide with a log.

    Args:
        device: device of the losses.
        gather: collects the values of all processes on each of them, `(1,)` -> `(processes,)`.
    """

    def __init__(self, device: torch.device, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.gather = gather
        self.sum = torch.zeros(1, device=device)  # of this process
        self.logged_step = 0
        self.logged_total = 0.0  # mean over the processes, summed over the steps up to logged_step

    def add(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share of the loss of its optimizer step, a scalar."""
        self.sum += loss

    def mean_since_last_log(self, step: int) -> float:
        """Return the mean loss of the steps since the last call, over all processes, after `step` steps."""
        # One synchronisation per log, not per step.
        total = self.gather(self.sum).mean().item()
        mean = total / max(1, step - self.logged_step)
        self.logged_total += total
        self.logged_step = step
        self.sum.zero_()
        return mean

    def mean_of_run(self, step: int) -> float:
        """Return the mean loss of all `step` steps of the run so far, over all processes."""
        return (self.logged_total + self.gather(self.sum).mean().item()) / max(1, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as JSON; it is the same on every process."""
        sums = self.gather(self.sum).tolist()
        return {"sums": sums, "logged_step": self.logged_step, "logged_total": self.logged_total}

    def load_state_dict(self, state: dict[str, Any], process: int, processes: int) -> None:
        """Continue from a checkpoint. If the number of processes has changed, each takes the mean of the sums."""
        sums = state["sums"]
        self.sum.fill_(sums[process] if len(sums) == processes else sum(sums) / len(sums))
        self.logged_step, self.logged_total = state["logged_step"], state["logged_total"]


class ResumableFlow(TrainerCallback):
    """Delay saving until the same step is logged and evaluated, so that a resumed run repeats an uninterrupted one.

    A save that falls on the last step of an epoch, or of the run, waits for what is logged and evaluated there: a run
    that resumes from it starts with the next epoch and would never catch up.
    """

    def __init__(self) -> None:
        self.waiting = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log, evaluate and save as often as the arguments say, which may differ from the resumed state."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if control.should_save and (float(state.epoch).is_integer() or state.global_step >= state.max_steps):
            control.should_save, self.waiting = False, True
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.waiting:
            control.should_save, self.waiting = True, False
        return control
