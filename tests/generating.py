"""Shared by the tests of generation: prompts, tiny models of every family, and a plain loop to compare with."""

import math

import torch
import torch.nn.functional as F
from shared_models import CLASSES, randomized


PAD, MASK = 2, 47  # of the tiny configuration
FAMILIES = {
    "bd3lm": {"model_length": 16, "block_size": 4},
    "mdlm": {"model_length": 8},
    "sedd": {"model_length": 8},
    "ar": {"model_length": 16},
}


def make_family(family: str, seed: int = 2, **fields):
    """A model of a family whose greedy text varies and never ends, in float64: no two tokens are nearly tied."""
    (model_class, config_class), sizes = CLASSES[family], FAMILIES[family]
    ids = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": PAD}
    known = {"vocab_size": 48, "hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2, "dropout": 0.0}
    model = randomized(model_class(config_class(**{**known, **ids, **sizes, **fields})), seed).eval()
    with torch.no_grad():
        # Masked positions differ by what they attend to: make that large, and what they share small.
        model.backbone.vocab_embed.embedding.mul_(4)[model.config.mask_token_id] = 0
        for layer in model.backbone.blocks:
            layer.attn_qkv.weight.mul_(6)
        model.get_output_embeddings().bias.zero_()
        for shared in getattr(model.backbone.output_layer, "adaLN_modulation", torch.nn.Module()).parameters():
            shared.zero_()
    return model.double()


def prompts_of(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 47, (length,), generator=generator) for length in lengths]


def batch_of(prompts: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    pad = lambda x, value: F.pad(x, (width - len(x), 0) if side == "left" else (0, width - len(x)), value=value)  # noqa: E731
    return {
        "input_ids": torch.stack([pad(x, PAD) for x in prompts]),
        "attention_mask": torch.stack([pad(torch.ones_like(x), 0) for x in prompts]),
    }


def generate(model, input_ids: torch.Tensor | None = None, **arguments):
    """`model.generate` with logits, greedy by default; a row of ids becomes a batch."""
    if input_ids is not None and input_ids.dim() == 1:
        input_ids = input_ids[None]
    arguments = {"max_new_tokens": 11, "do_sample": False, "output_logits": True, **arguments}
    return model.generate(input_ids, return_dict_in_generate=True, **arguments)


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.drafts: list[tuple[int, list[int]]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def put_draft(self, value: torch.Tensor) -> None:
        self.drafts.append((sum(map(len, self.puts)), value.tolist()))

    def end(self) -> None:
        self.ended = True


def new_tokens(output) -> torch.Tensor:
    return output.sequences[:, output.sequences.shape[1] - len(output.logits) :]


def assert_same(ours, theirs, atol: float = 1e-5) -> None:
    """The same new tokens from the same logits."""
    assert torch.equal(new_tokens(ours), new_tokens(theirs))
    for mine, other in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(mine, other, atol=atol, rtol=0)


# --- A plain loop ----------------------------------------------------------------------------------------------------

# Numbers with which the samplers reveal sometimes one and sometimes several positions of these models.
FIELDS = {
    "first_hitting": {},
    "ancestral": {"num_denoising_steps": 3},
    "confidence": {"confidence_threshold": 0.3},
    "entropy_bound": {"entropy_bound": 2.0},
    "analytic": {},
}


def in_three_steps(masked, count, confidence, entropy):
    """Reveal the k-th third of the `count` masked positions of a block, from the left, in step k."""
    steps = [min(2, math.floor((rank + 0.5) / count * 3)) for rank in range(count)][count - len(masked) :]
    return {position for position, step in zip(masked, steps, strict=True) if step == steps[0]}


def confident(masked, count, confidence, entropy):
    first = max(masked, key=lambda position: confidence[position])
    return {position for position in masked if confidence[position] > 0.3} | {first}


def nearly_independent(masked, count, confidence, entropy):
    sums, revealed = [], set()
    for position in sorted(masked, key=lambda position: entropy[position]):
        sums.append(entropy[position])
        if sum(sums) - max(sums) > 2.0:
            break
        revealed.add(position)
    return revealed


RULES = {
    "first_hitting": lambda masked, count, confidence, entropy: {min(masked)},
    "ancestral": in_three_steps,
    "confidence": confident,
    "entropy_bound": nearly_independent,
}


@torch.no_grad()
def plain_loop(model, prompt: torch.Tensor, count: int, sampler: str) -> tuple[list[int], int]:
    """Greedy text from whole forward passes over the window, and the number of denoising steps."""
    size, length, steps = model.config.block_size, model.config.model_length, 0
    stride = size if size < length else length // 2
    text, goal = prompt.tolist(), len(prompt) + count
    while len(text) < goal:
        begin = max(0, ((len(text) - size) // stride + 1) * stride)
        text += [MASK] * (begin + size - len(text))
        first, num_masked = max(0, len(text) - length), text[begin:].count(MASK)
        while MASK in text[:goal]:
            logits = model(torch.tensor([text[first:]])).logits[0].float()
            logits[:, [MASK, PAD]] = -torch.inf
            probability = logits.softmax(-1)
            confidence = dict(enumerate(probability.amax(-1).tolist(), first))
            entropy = dict(enumerate(torch.special.entr(probability).sum(-1).tolist(), first))
            masked = [position for position, token in enumerate(text) if token == MASK]
            for position in RULES[sampler](masked, num_masked, confidence, entropy):
                text[position] = int(logits[position - first].argmax())
            steps += 1
    return text[len(prompt) : goal], steps
