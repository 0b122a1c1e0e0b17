"""The held-out loss is the training objective, drawn the same whatever the batches and processes are."""

import pytest
import torch

from bd3lm_hf import SSDLMConfig, SSDLMForMaskedLM
from bd3lm_hf.evaluation.perplexity import sequence_losses, summarize_losses


@pytest.fixture
def model(randomize) -> SSDLMForMaskedLM:
    sizes = {"vocab_size": 20, "hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "dropout": 0.3}
    return randomize(SSDLMForMaskedLM(SSDLMConfig(**sizes, block_size=4, model_length=16)))


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Texts of several lengths; of one, the beginning is given."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 19, (length,), generator=generator).tolist() for length in (16, 9, 16, 12, 7)]
    rows = [{"input_ids": ids, "labels": list(ids)} for ids in texts]
    rows[3]["labels"][:5] = [-100] * 5
    return rows


def test_batches_and_processes_change_nothing(model, rows):
    model.train()
    whole = sequence_losses(model, rows, num_samples=3, batch_size=2, seed=1)
    assert model.training  # as it was, and without dropout in between
    parts = [
        score
        for share in (range(0, 5, 2), range(1, 5, 2))
        for score in sequence_losses(model, rows, indices=share, num_samples=3, batch_size=8, seed=1)
    ]
    first, second = summarize_losses(whole), summarize_losses(parts + parts[:1])  # a row that comes twice counts once
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
    assert (first.num_sequences, first.num_tokens) == (second.num_sequences, second.num_tokens) == (5, 55)
    assert summarize_losses(sequence_losses(model, rows, num_samples=3, seed=2)).loss != first.loss


def test_a_score_is_the_mean_loss_over_the_draws(model, rows):
    (score,) = sequence_losses(model, rows[:1], num_samples=4000, batch_size=4000, seed=3)
    model.eval()
    ids = torch.tensor([rows[0]["input_ids"]]).expand(4000, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert score.num_tokens == 16
    assert score.nll / score.num_tokens == pytest.approx(expected, rel=0.03)


def test_what_can_not_be_computed_is_refused(model, rows):
    with pytest.raises(ValueError, match="batch_size=0: give at least 1"):
        sequence_losses(model, rows, batch_size=0)
    with pytest.raises(ValueError, match="0 sequences hold no scored token"):
        summarize_losses([])
    with pytest.raises(ValueError, match="a text of 4 tokens holds no context and block of 4"):
        sequence_losses(model, [[3, 4, 5, 6]])
