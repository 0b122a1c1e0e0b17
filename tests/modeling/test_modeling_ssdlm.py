"""SSD-LM: parity of the network and its training step, padding, seeded noise, and what is refused."""

import pytest
import torch
from noisy_text import gradients
from published import published_ssdlm
from shared_models import tiny_ssdlm
from transformers import AutoConfig, BertConfig

from bd3lm_hf.modeling.configuration_ssdlm import SSDLMConfig
from bd3lm_hf.modeling.modeling_ssdlm import SSDLMForMaskedLM


RECORDED = "11_ssdlm"
SIZES = {"vocab_size": 20, "hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def published() -> SSDLMForMaskedLM:
    return published_ssdlm(num_train_timesteps=1000)


@pytest.fixture
def tiny(randomize) -> SSDLMForMaskedLM:
    return randomize(tiny_ssdlm(**SIZES))


def test_the_network_is_the_published_one(published, recorded):
    embedded = published.embed_sum(recorded["train.simplex"])
    torch.testing.assert_close(embedded, recorded["train.simplex_embeds"], atol=1e-5, rtol=0)
    progress = (recorded["train.t"] / 1000).view(-1, 1, 1)
    torch.testing.assert_close(published.timestep(progress), recorded["train.timestep_embeds"], atol=1e-5, rtol=0)
    context = recorded["train.input_ids"][:, : int(recorded["train.context_size"])]
    noisy, times = recorded["train.noisy_logits"], recorded["train.t"] / 1000
    logits = published(context, noisy_logits=noisy, timesteps=times).logits
    torch.testing.assert_close(logits, recorded["train.logits"], atol=1e-4, rtol=0)


def test_a_head_with_a_tied_bias_is_not_split_between_devices(published, tmp_path):
    published.save_pretrained(tmp_path / "model")
    size = sum(weight.numel() * weight.element_size() for weight in published.parameters())
    devices = set()
    for share in (0.9, 0.98, 1.0):  # whether the last one fits into memory depends on the version of transformers
        options = {"device_map": "auto", "max_memory": {"cpu": int(share * size)}, "offload_folder": tmp_path / "disk"}
        placed = SSDLMForMaskedLM.from_pretrained(tmp_path / "model", **options)
        devices |= {str(device) for device in getattr(placed, "hf_device_map", {}).values()}
    assert devices == {"disk", "cpu"}


def test_a_trainer_evaluates_the_same_text_with_the_same_noise(tiny):
    ids = torch.randint(3, 19, (2, 12), generator=torch.Generator().manual_seed(0))
    count = {"num_items_in_batch": 12}
    with torch.no_grad():
        first, second = (tiny(ids[:1], labels=ids[:1], **count) for _ in range(2))
        padded, mask = torch.cat([ids[:1] * 0 + 1, ids[:1]], dim=1), torch.tensor([[0] * 12 + [1] * 12])
        other = tiny(padded, mask, labels=padded, **count)
    assert torch.equal(first.loss, second.loss) and int(first.mask.sum()) == 4
    torch.testing.assert_close(first.loss, first.nll.sum() / 4)
    torch.testing.assert_close(other.nll[:, 12:], first.nll)
    assert torch.equal(other.mask[:, 12:], first.mask) and not other.nll[:, :12].any()


def test_no_linear_layer_has_a_single_column_which_quantizers_cannot_pack(tiny):
    assert all(min(m.weight.shape) > 1 for m in tiny.modules() if isinstance(m, torch.nn.Linear))


def test_the_loss_is_the_published_one(published, recorded, monkeypatch):
    ids, context = recorded["train.input_ids"], int(recorded["train.context_size"])
    # The uniform numbers that give the recorded steps and context: the middle of their intervals.
    most = ids.shape[1] - 5
    block_noise = torch.stack([(recorded["train.t"] - 0.5) / 1000, torch.full((2,), (context - 0.5) / most)], dim=1)
    monkeypatch.setattr(SSDLMForMaskedLM, "_normal", lambda self, seeds, like: recorded["train.normal"])
    loss = published(ids, labels=ids, block_noise=block_noise, count_noise=torch.zeros(2, 2)).loss
    torch.testing.assert_close(loss, recorded["train.loss"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_context_gives_the_logits_of_the_row_alone(tiny, side):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 19, (2, 7), generator=generator)
    noisy, timesteps = torch.randn(2, 4, 20, generator=generator), torch.tensor([0.3, 0.8])
    mask = torch.ones_like(ids)
    real = slice(3, 7) if side == "left" else slice(0, 4)
    mask[1] = 0
    mask[1, real] = 1
    both = tiny(ids, attention_mask=mask, noisy_logits=noisy, timesteps=timesteps).logits
    alone = tiny(ids[1:, real], noisy_logits=noisy[1:], timesteps=timesteps[1:]).logits
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[:1], tiny(ids[:1], noisy_logits=noisy[:1], timesteps=timesteps[:1]).logits)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows(tiny):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 19, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    noise = {name: torch.rand(3, 2, generator=generator) for name in ("block_noise", "count_noise")}
    rows = []
    for row, end in enumerate((12, 12, 9)):
        one = (slice(row, row + 1), slice(end))
        own = {name: draw[row : row + 1] for name, draw in noise.items()}
        rows.append(tiny(ids[one], labels=labels[one], **own).loss)
    expected = (12 * rows[0] + 12 * rows[1] + 9 * rows[2]) / 33
    for given in (labels, ids):  # padding is not scored, labelled or not
        torch.testing.assert_close(tiny(ids, attention_mask=mask, labels=given, **noise).loss, expected)
    halved = tiny(ids, attention_mask=mask, labels=labels, num_items_in_batch=66, **noise).loss
    torch.testing.assert_close(halved, expected / 2)


def test_tokens_without_a_label_are_context_only(tiny):
    ids = torch.randint(3, 19, (1, 8), generator=torch.Generator().manual_seed(2))
    noise = {"block_noise": torch.tensor([[0.5, 0.99]]), "count_noise": torch.rand(1, 2)}
    labels = ids.clone()
    labels[0, :6] = -100
    changed = labels.clone()
    changed[0, 6:] = (ids[0, 6:] - 3 + 1) % 16 + 3
    assert tiny(ids, labels=labels, **noise).loss != tiny(ids, labels=changed, **noise).loss
    labels[0, 6:] = -100
    assert tiny(ids, labels=labels, **noise).loss == 0


def test_the_simplex_layer_starts_as_the_word_embeddings():
    model = tiny_ssdlm(**SIZES)
    assert torch.equal(model.embed_sum.weight, model.get_input_embeddings().weight.T)


def test_another_encoder_works(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = BertConfig(vocab_size=20, **sizes)
    model = SSDLMForMaskedLM(SSDLMConfig(encoder_config=encoder, block_size=4, model_length=16)).eval()
    model.save_pretrained(tmp_path)
    loaded = SSDLMForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(loaded.model).__name__ == "BertForMaskedLM"
    inputs = {"noisy_logits": torch.randn(1, 4, 20), "timesteps": torch.tensor([0.5])}
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded(ids, **inputs).logits, model(ids, **inputs).logits)


def test_dropout_is_the_encoders_unless_it_is_given():
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {"block_size": 4, "model_length": 16}
    own = BertConfig(**sizes, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    config = SSDLMConfig.from_dict(SSDLMConfig(encoder_config=own, **fields).to_dict())
    encoder = config.encoder_config
    assert (config.dropout, encoder.hidden_dropout_prob, encoder.attention_probs_dropout_prob) == (0.3, 0.3, 0.2)
    changed = SSDLMConfig.from_dict({**config.to_dict(), "dropout": 0.0}).encoder_config
    assert (changed.hidden_dropout_prob, changed.attention_probs_dropout_prob) == (0.0, 0.0)
    assert SSDLMConfig(**{**SIZES, "dropout": None}, **fields).dropout == 0.1


@pytest.mark.parametrize("size", [22, 18])
def test_the_vocabulary_can_grow_and_the_simplex_with_it(randomize, size, tmp_path):
    model = randomize(tiny_ssdlm(**SIZES, mask_token_id=3))
    before = model.embed_sum.weight.clone()
    model.resize_token_embeddings(size)
    kept = min(size, 20)
    assert torch.equal(model.embed_sum.weight[:, :kept], before[:, :kept])
    assert torch.equal(model.embed_sum.weight[:, kept:], model.get_input_embeddings().weight.T[:, kept:])
    model.save_pretrained(tmp_path)
    loaded = SSDLMForMaskedLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == loaded.config.encoder_config.vocab_size == size
    assert loaded(**loaded.dummy_inputs).logits.shape == (2, 4, size)


def test_the_sizes_have_their_common_names_too():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = SSDLMConfig(**sizes, block_size=4)
    assert (config.hidden_dim, config.n_blocks, config.n_heads, config.model_length) == (16, 1, 2, 16)
    assert (config.encoder_config.hidden_size, config.encoder_config.num_hidden_layers) == (16, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tiny, ids: tiny.token_nll(ids), "SSD-LM has no tractable likelihood"),
        (lambda tiny, ids: tiny(ids), "a context alone has no logits: pass noisy_logits and timesteps"),
        (lambda tiny, ids: tiny(ids[:, :4], labels=ids[:, :4]), "a text of 4 tokens .* block of 4"),
        (
            lambda tiny, ids: tiny(ids, labels=ids, block_noise=torch.rand(1, 3), count_noise=torch.rand(1, 2)),
            r"block_noise of shape \(1, 3\).*give \(1, 2\) for each",
        ),
        (lambda tiny, ids: tiny.resize_token_embeddings(19), r"embeddings\(19\).* mask_token_id=19: keep at least 20"),
    ],
)
def test_calls_that_do_not_fit_are_refused(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny, torch.arange(3, 15)[None])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 20}, "block_size=20 leaves no room for context in a window of model_length=16"),
        ({"block_size": 16}, "block_size=16 leaves no room for context in a window of model_length=16"),
        ({"one_hot_value": 0}, "one_hot_value=0: the scale K of the simplex must be above 0"),
        ({"one_hot_value": -5}, "one_hot_value=-5: the scale K of the simplex must be above 0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0: give a whole number of at least 1"),
        ({"encoder_config": {"model_type": "nothing"}}, "encoder_config has model_type='nothing'"),
        ({"encoder_config": {"model_type": "gpt2"}}, "encoder_config is a GPT2Config.* no masked language"),
        ({"encoder_config": AutoConfig.for_model("distilbert"), "dropout": 0.2}, "dropout=0.2: a DistilBertConfig"),
        ({"encoder_config": AutoConfig.for_model("roberta", max_position_embeddings=17)}, "give at most 15"),
    ],
)
def test_configurations_that_no_model_can_have_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SSDLMConfig(**{"block_size": 4, "model_length": 16, **fields})


def test_recomputing_activations_changes_no_gradient(tiny):
    ids = torch.randint(3, 19, (2, 12), generator=torch.Generator().manual_seed(4))
    noise = {"block_noise": torch.rand(2, 2), "count_noise": torch.rand(2, 2)}
    plain = gradients(tiny, tiny(ids, labels=ids, **noise).loss)
    tiny.train().gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(tiny, tiny(ids, labels=ids, **noise).loss), plain)
