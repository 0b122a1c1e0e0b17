"""What the tests of decoding share: prompts, batches of them, and what a model writes."""

import torch
import torch.nn.functional as F


MASK = 47  # of the tiny configuration


def prompts_of(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 47, (length,), generator=generator) for length in lengths]


def batch_of(prompts: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    pad = lambda x, value: F.pad(x, (width - len(x), 0) if side == "left" else (0, width - len(x)), value=value)  # noqa: E731
    return {
        "input_ids": torch.stack([pad(x, 2) for x in prompts]),
        "attention_mask": torch.stack([pad(torch.ones_like(x), 0) for x in prompts]),
    }


def write(model, **arguments):
    arguments = {"max_new_tokens": 11, "do_sample": False, **arguments}
    return model.generate(**arguments, return_dict_in_generate=True, output_logits=True)


def new_tokens(output) -> torch.Tensor:
    return output.sequences[:, -len(output.logits) :]
