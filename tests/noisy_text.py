"""Random text of the tiny configuration, noise and a plain loss, for the tests of losses and likelihoods."""

import torch
from shared_models import randomized

from bd3lm_hf.modeling.attention_bd3lm import token_layout
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.loss_bd3lm import Corruption, corrupt, loss_mask
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.modeling.noise_bd3lm import Noise, draw_noise


MASK = 47


def toy_model(block_size: int, **fields) -> BD3LMForMaskedLM:
    """A model of three tokens and the mask (3) that is far from uniform."""
    sizes = {"vocab_size": 4, "model_length": 12, "hidden_dim": 8, "cond_dim": 8, "n_blocks": 2, "n_heads": 2}
    config = BD3LMConfig(**sizes, block_size=block_size, dropout=0.0, **fields)
    return randomized(BD3LMForMaskedLM(config), seed=2, std=0.2).eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))


def some_masked(ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < 0.5, MASK, ids)


def given_noise(rows: int, blocks: int, length: int, seed: int = 0, draws: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return draw_noise(rows, blocks, length, num_noise_samples=draws, generator=generator)._asdict()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def masked_of(
    model: BD3LMForMaskedLM,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    noise: Noise | None = None,
    interval: tuple[float, float] = (1e-3, 1.0),
) -> Corruption:
    """Masked positions, weights and masking probabilities that the loss would use."""
    layout = token_layout(attention_mask, labels.shape[1], model.config.block_size, device=labels.device)
    scored = loss_mask(layout, labels, ignore_bos=model.config.ignore_bos, training=model.training)
    return corrupt(model, layout, scored, noise, *interval)


def nll_of(model: BD3LMForMaskedLM, x_t: torch.Tensor, x_0: torch.Tensor, **arguments) -> torch.Tensor:
    """-log p(x_0 | x_t) of every token under SUBS, from the whole logits; zero where x_t is not masked."""
    logits = model(input_ids=x_t, clean_input_ids=x_0, **arguments).logits.double()
    logits[..., model.config.mask_token_id] = -torch.inf
    nll = -logits.log_softmax(-1).gather(-1, x_0.unsqueeze(-1)).squeeze(-1)
    return torch.where(x_t == model.config.mask_token_id, nll, 0.0)
