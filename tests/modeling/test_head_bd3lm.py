"""The head runs in chunks and sees masked positions only."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from noisy_text import given_noise, masked_of, random_ids
from shared_models import tiny_bd3lm
from torch.utils._python_dispatch import TorchDispatchMode

from bd3lm_hf.modeling import loss_bd3lm
from bd3lm_hf.modeling.layers_bd3lm import is_plain_linear
from bd3lm_hf.modeling.loss_bd3lm import chunked_cross_entropy, cross_entropy
from bd3lm_hf.modeling.noise_bd3lm import Noise


CONFIG = SimpleNamespace(vocab_size=48, mask_token_id=47)


class ScaledHead(torch.nn.Linear):
    """A head that is not a plain linear layer."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * 1.5


def head_inputs(head: torch.nn.Module, rows: int = 23) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, head.in_features, generator=generator, requires_grad=True)
    return hidden, torch.randint(0, 47, (rows,), generator=generator), torch.rand(rows, generator=generator) * 5


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head_class", [torch.nn.Linear, ScaledHead])
def test_the_chunked_head_equals_plain_cross_entropy_over_full_logits(monkeypatch, head_class, bias, chunk):
    monkeypatch.setattr(loss_bd3lm, "_LOGIT_BUDGET", chunk * 48)
    torch.manual_seed(0)
    head = head_class(16, 48, bias=bias)
    assert is_plain_linear(head) == (head_class is torch.nn.Linear)
    hidden, targets, weights = head_inputs(head)
    found = chunked_cross_entropy(hidden, head, targets, weights, CONFIG)
    logits = head(hidden).clone()
    logits[:, 47] = -torch.inf
    each = F.cross_entropy(logits, targets, reduction="none")
    expected = (each * weights).sum()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, head, targets, CONFIG), each)
    parameters = [hidden, *head.parameters()]
    # A factor after the loss, as in gradient accumulation and loss scaling.
    ours, theirs = (torch.autograd.grad(loss * 0.3, parameters) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_head_has_the_loss_and_gradients_of_an_eager_one(monkeypatch, fresh_compiler, bias):
    monkeypatch.setattr(loss_bd3lm, "_LOGIT_BUDGET", 7 * 48)
    head, found = torch.nn.Linear(16, 48, bias=bias), []
    hidden, targets, weights = head_inputs(head)
    for function in (chunked_cross_entropy, torch.compile(chunked_cross_entropy, backend="aot_eager")):
        loss = function(hidden, head, targets, weights, CONFIG)
        found.append((loss, *torch.autograd.grad(loss * 0.3, [hidden, *head.parameters()])))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen):
    head = torch.nn.Linear(16, 48)
    hidden, targets, weights = head_inputs(head)
    tensors = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    tensors[frozen].requires_grad_(False)
    chunked_cross_entropy(hidden, head, targets, weights, CONFIG).backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


def test_a_hook_on_the_head_is_called(tiny_model):
    called = []
    head = tiny_model.get_output_embeddings()
    ids, noise = random_ids(2, 8), given_noise(2, 2, 8)
    plain = tiny_model(input_ids=ids, labels=ids, **noise).loss
    head.register_forward_hook(lambda module, inputs, output: called.append(1))
    assert not is_plain_linear(head)
    torch.testing.assert_close(tiny_model(input_ids=ids, labels=ids, **noise).loss, plain)
    assert called


def test_a_second_backward_through_the_fused_head_is_refused():
    head = torch.nn.Linear(16, 48)
    hidden, targets, weights = head_inputs(head)
    loss = chunked_cross_entropy(hidden, head, targets, weights, CONFIG)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="single backward pass: run the forward pass again"):
        loss.backward()


def test_no_rows_give_a_loss_of_zero_with_a_gradient():
    for head in (torch.nn.Linear(16, 48), ScaledHead(16, 48)):
        hidden = torch.zeros(0, 16, requires_grad=True)
        loss = chunked_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long), torch.zeros(0), CONFIG)
        loss.backward()
        assert loss.item() == 0 and hidden.grad.shape == (0, 16)
        assert cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long), CONFIG).shape == (0,)


class LargestLogits(TorchDispatchMode):
    """Rows of the largest floating-point tensor whose last axis is the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocab_size,):
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
        return output


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("draws", [1, 3])
def test_training_never_builds_logits_of_the_whole_batch(randomize, monkeypatch, plain, draws):
    model = tiny_bd3lm().train()
    if not plain:
        model.set_output_embeddings(randomize(ScaledHead(32, 48)))
    ids, noise = random_ids(8, 32), given_noise(8, 8, 32, draws=draws)
    masked, _, _ = masked_of(model, ids, noise=Noise(**noise))
    rows = int(masked.sum())
    assert 60 * draws < rows < 0.7 * draws * 8 * 32

    def largest() -> int:
        with LargestLogits(48) as seen:
            model(input_ids=ids, labels=ids, **noise).loss.backward()
        return seen.rows

    assert largest() == rows  # masked positions only
    monkeypatch.setattr(loss_bd3lm, "_LOGIT_BUDGET", 16 * 48)
    assert largest() <= 32  # a chunk of 16; the transposed head has 32 rows


def test_scoring_builds_logits_of_masked_positions_only(tiny_model, monkeypatch):
    monkeypatch.setattr(loss_bd3lm, "_LOGIT_BUDGET", 16 * 48)
    with LargestLogits(48) as seen:
        tiny_model.token_nll(random_ids(4, 32), estimator="exact")
    assert 0 < seen.rows <= 32
