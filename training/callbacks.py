"""What a run shows while it trains: its speed, and a text sample at each evaluation."""

import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SpeedMeter(TrainerCallback):
    """Speed of training over all processes; time spent in evaluation and saving does not count.

    Args:
        peak_flops: floating-point operations per second that the devices can do together; 0 when it is not known.
    """

    def __init__(self, peak_flops: float = 0.0) -> None:
        self.peak_flops = peak_flops
        self.tokens = 0  # the trainer adds those of each micro-batch
        self.flops = 0.0  # likewise
        self.seconds = 0.0
        self.started: float | None = None

    @staticmethod
    def now() -> float:
        """Seconds of a clock that never goes back."""
        return time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.started = self.now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        if self.started is not None:
            self.seconds += self.now() - self.started

    def since_last_log(self) -> dict[str, float]:
        """Means since the last call: `tokens_per_second`, rounded to whole tokens, and `tflops_per_second`.

        Where the peak is known also `mfu`, the share of it that is used. Empty before the first step.
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


def write_text(model: Any, tokenizer: Any, *, prompt: str = "", max_new_tokens: int = 64, seed: int = 0) -> str:
    """Continue `prompt` (or start from nothing) by `model.generate`; torch's random state is left as it was.

    Returns:
        Prompt and continuation, without special tokens.
    """
    device = model.device
    inputs = tokenizer(prompt, return_tensors="pt").to(device) if prompt else {}
    keywords = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            # One process writes alone: its weights are whole, also where training spreads them over processes.
            keywords["synced_gpus"] = False
            ids = model.generate(**keywords, do_sample=True, max_new_tokens=max_new_tokens)
    finally:
        model.train(was_training)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


class SampleCallback(TrainerCallback):
    """Writes a text sample at each evaluation, to the terminal and to a file.

    Args:
        tokenizer: decodes the sample.
        prompt: start of the text; empty for an unprompted sample.
        max_new_tokens: length of the sample.
        path: file that the samples are appended to.
    """

    def __init__(self, tokenizer: Any, *, prompt: str, max_new_tokens: int, path: str | Path) -> None:
        self.tokenizer, self.prompt, self.max_new_tokens = tokenizer, prompt, max_new_tokens
        self.path = Path(path)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write one sample; the same seed each time, so that samples of different steps compare."""
        if not state.is_world_process_zero:
            return
        text = write_text(
            kwargs["model"],
            self.tokenizer,
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            seed=args.seed,
        )
        entry = f"--- sample at step {state.global_step} ---\n{text}\n"
        tqdm.write(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(entry)


__all__ = ["SampleCallback", "SpeedMeter", "write_text"]
