"""Block diffusion on stock decoders: masks, streams, caches and losses against brute force and the stock model."""

import pytest
import torch
import torch.nn.functional as F
from decoders import BLOCK, FAMILIES, LENGTH, MASK, masked, random_ids, tiny_decoder, tiny_stock
from generating import make_family
from safetensors.torch import load_file

from bd3lm_hf.modeling.decoder_backbone_bd3lm import decoder_mask
from bd3lm_hf.modeling.inputs_bd3lm import token_layout
from bd3lm_hf.modeling.noise_bd3lm import Noise


CONTEXTS, ALIGNMENTS = ("block", "token"), ("same", "shifted", "shifted_noisy")
every_decoder = pytest.mark.parametrize("family", FAMILIES)
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def visible(query, key, positions, documents, valid, context, block):
    """Return whether a query sees a key, both (stream, column), by the table of the method."""
    (stream_q, i), (stream_k, j) = query, key
    if query == key:
        return True
    if not valid[j] or documents[i] != documents[j]:
        return False
    block_q, block_k = positions[i] // block, positions[j] // block
    if stream_q == 0:
        return stream_k == 0 and (block_k <= block_q if context == "block" else positions[j] <= positions[i])
    return block_k < block_q if stream_k == 0 else stream_k == stream_q and block_k == block_q


LAYOUTS = {
    "plain": ([1] * 7, None),
    "left": ([0, 0, 1, 1, 1, 1, 1], None),
    "right": ([1, 1, 1, 1, 1, 0, 0], None),
    "documents": ([1] * 7, [0, 1, 2, 3, 0, 1, 2]),
    "documents, padded": ([1] * 5 + [0] * 2, [0, 1, 2, 0, 1, 0, 1]),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_mask_equals_the_table_of_the_method(name, attention, context):
    mask, positions = LAYOUTS[name]
    config = tiny_decoder("llama", attention, context=context, block_size=2).config
    given = None if positions is None else torch.tensor([positions])
    layout = token_layout(torch.tensor([mask]), 7, 2, device=torch.device("cpu"), position_ids=given)
    made = decoder_mask(layout, config, torch.float32, num_streams=3)
    own = positions or (torch.tensor(mask).cumsum(0) - 1).clamp(min=0).tolist()
    documents = [sum(own[k] != own[k - 1] + 1 for k in range(1, i + 1)) if positions else 0 for i in range(7)]
    tokens = [(stream, column) for stream in range(3) for column in range(7)]
    for i, query in enumerate(tokens):
        if not mask[query[1]]:
            continue  # outputs of padding are never read
        for j, key in enumerate(tokens):
            if attention == "sdpa":
                seen = bool(made[0, 0, i, j] == 0)
            else:
                seen = bool(made.mask_mod(torch.tensor(0), torch.tensor(0), torch.tensor(i), torch.tensor(j)))
            assert seen == visible(query, key, own, documents, mask, context, 2), (query, key)


@every_attention
@every_decoder
def test_cached_blocks_have_the_logits_of_the_two_streams(family, attention):
    ids = random_ids()
    x_t = masked(ids)
    for context in CONTEXTS:
        for alignment in ALIGNMENTS[:2]:
            model = tiny_decoder(family, attention, context=context, alignment=alignment)
            with torch.no_grad():
                logits = model(input_ids=x_t, clean_input_ids=ids).logits
                cache = model(ids[:, :BLOCK], use_cache=True).past_key_values
                for begin in range(BLOCK, LENGTH, BLOCK):
                    block = slice(begin, begin + BLOCK)
                    read = model(x_t[:, block], past_key_values=cache, use_cache=False).logits
                    torch.testing.assert_close(read, logits[:, block], atol=1e-5, rtol=1e-4)
                    model(ids[:, block], past_key_values=cache, use_cache=True)


@every_attention
@every_decoder
def test_a_causal_context_is_the_stock_model(family, attention):
    stock = tiny_stock(family)
    ids = random_ids()
    for alignment in ("shifted", "shifted_noisy"):
        fields = {"context": "token", "alignment": alignment, "block_size": 1}
        model = tiny_decoder(family, attention, **fields)
        assert model.state_dict().keys() == stock.state_dict().keys()
        model.load_state_dict(stock.state_dict())
        with torch.no_grad():
            logits = stock(ids).logits[:, :-1]
            # The mask token has probability zero in block diffusion.
            logits[..., MASK] = -torch.inf
            expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            if alignment == "shifted":
                torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected, atol=1e-5, rtol=1e-5)
                nll = model.token_nll(ids)
                torch.testing.assert_close(nll.nll.sum() / nll.mask.sum(), expected, atol=1e-5, rtol=1e-5)
            clean = model.stream_hidden(ids, ids, token_layout(None, LENGTH, 1, device=ids.device)).clean
            torch.testing.assert_close(model.logits_head()(clean), stock(ids).logits, atol=1e-5, rtol=1e-4)


@every_attention
@every_decoder
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fields", [{}, {"context": "token", "ar_loss_weight": 0.5}], ids=["block", "token"])
def test_padding_and_packing_change_no_loss_score_or_logit(fields, side, family, attention):
    model = tiny_decoder(family, attention, alignment="shifted", **fields).train()  # the second loss is of training
    noise, ids, lengths = Noise(torch.rand(2, 2), torch.rand(2, 8), torch.rand(2, 2)), random_ids(2, 8), (8, 5)
    rows, mask, tokens = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros(2, 8)
    apart, logits, scores = 0.0, [], []
    with torch.no_grad():
        for row, length in enumerate(lengths):
            own = {"block_noise": noise.block_noise[row, None], "token_noise": noise.token_noise[row, None, :length]}
            text = ids[row, None, :length]
            apart += model(input_ids=text, labels=text, num_items_in_batch=10, **own).loss
            logits.append(model(text).logits[0])
            scores.append(model.token_nll(text, estimator="exact").nll[0])
            where = slice(0, length) if side == "right" else slice(8 - length, 8)
            rows[row, where], mask[row, where], tokens[row, where] = text[0], 1, own["token_noise"][0]
        inputs = {"input_ids": rows, "attention_mask": mask, "labels": rows.masked_fill(mask == 0, -100)}
        own = {"block_noise": noise.block_noise, "token_noise": tokens}
        together = model(**inputs, **own, num_items_in_batch=10).loss
        padded = model(rows, attention_mask=mask).logits[mask.bool()]
        scored = model.token_nll(rows, mask, estimator="exact").nll[mask.bool()]
        text, positions = rows[mask.bool()][None], torch.cat([torch.arange(length) for length in lengths])[None]
        packed = model(text, position_ids=positions).logits[0]
        given = Noise(noise.block_noise.view(1, 4), tokens[mask.bool()][None], noise.count_noise.view(1, 4))
        packed_loss = model.objective(text, text, None, given, 10, position_ids=positions)
    for found in (together, packed_loss):
        torch.testing.assert_close(found, apart, atol=1e-5, rtol=1e-5)
    for found in (padded, packed):
        torch.testing.assert_close(found, torch.cat(logits), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scored, torch.cat(scores), atol=1e-5, rtol=1e-5)


@every_decoder
def test_a_saved_folder_has_the_weights_of_the_stock_class(family, tmp_path):
    model, stock = tiny_decoder(family), tiny_stock(family)
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    names = [load_file(tmp_path / kind / "model.safetensors").keys() for kind in ("ours", "stock")]
    assert names[0] == names[1]
    again = type(model).from_pretrained(tmp_path / "ours")
    ids = random_ids()
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)


@every_attention
@every_decoder
def test_training_reaches_every_weight(family, attention):
    model = tiny_decoder(family, attention).train()
    model.gradient_checkpointing_enable()
    ids = random_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_attention_that_cannot_work_is_refused_by_name():
    with pytest.raises(ValueError, match="flash_attention_2.*sdpa"):
        tiny_decoder("qwen3", "flash_attention_2")
    with pytest.raises(ValueError, match="flex_attention.*GPT2LMHeadModel.*sdpa"):
        tiny_decoder("gpt2", "flex_attention")
    model, ids = tiny_decoder("llama", "flex_attention"), random_ids()
    with pytest.raises(ValueError, match="no backward pass on a CPU"):
        model.train()(input_ids=ids, labels=ids)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_flex_attention_on_a_cpu_is_eager_attention(family):
    models, ids = [tiny_decoder(family, attention) for attention in ("flex_attention", "eager")], random_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = []
    # The kernel, whose compilation takes seconds, is compiled for one family.
    with torch.no_grad(), torch.compiler.set_stance("default" if family == "llama" else "force_eager"):
        for model in models:
            two_streams = model(input_ids=masked(ids), clean_input_ids=ids, attention_mask=mask).logits[mask > 0]
            text = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
            found.append((two_streams, model.token_nll(ids, mask, estimator="exact").nll, text))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        ("mistral", {"sliding_window": 16}),
        ("gemma3_text", {"sliding_window": 16}),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}),
        ("gpt2", {"n_positions": 16}),
    ],
)
def test_a_text_beyond_a_window_of_the_network_is_refused(family, limit):
    model, ids = tiny_decoder(family, model_length=16, **limit), random_ids(2, 20)
    for call in (
        lambda: model(ids),
        lambda: model(input_ids=ids, labels=ids),
        lambda: model(input_ids=masked(ids), clean_input_ids=ids),
        lambda: model.token_nll(ids, estimator="exact"),
        lambda: model(ids[:, 16:], past_key_values=model(ids[:, :16], use_cache=True).past_key_values),
    ):
        with pytest.raises(ValueError, match="20 tokens is longer than .*=16"):
            call()
    documents = torch.tensor([[*range(12), *range(8)]])
    assert torch.isfinite(model(input_ids=ids, labels=ids, position_ids=documents).loss)
    if family != "gpt2":  # the window slides over generated text
        text = model.generate(ids[:, :8], max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert text.shape == (2, 28)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_way_of_masking_has_the_exact_bound_as_its_mean(family):
    ids = random_ids(1, 8).expand(512, -1)
    for fields in ({}, {"masking": "exact_k"}, {"complementary": True}):
        model = tiny_decoder(family, alignment="shifted", **fields)
        expected = model.token_nll(ids[:1], estimator="exact")
        losses = []
        for seed in range(8):
            torch.manual_seed(seed)
            with torch.no_grad():
                losses.append(model.train()(input_ids=ids, labels=ids, num_items_in_batch=7 * 512).loss.item())
        assert sum(losses) / 8 == pytest.approx((expected.nll.sum() / 7).item(), rel=0.02), fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 128}, "block_size=128"),
        ({"block_size": 3}, "block_size=3.*model_length=30"),
        ({"block_size": 64}, "block_size=64.*model_length=64"),
        ({"model_length": 128}, "model_length=128"),
        ({"alignment": "left"}, "alignment='left'"),
        ({"context": "all"}, "context='all'"),
        ({"alignment": "shifted", "ignore_bos": False}, "ignore_bos=False"),
        ({"time_conditioning": True}, "time_conditioning=True"),
        ({"ar_loss_weight": 0.2}, "ar_loss_weight=0.2"),
        ({"mask_token_id": 2}, "mask_token_id=2"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder("qwen3", **fields)


def test_the_next_token_loss_is_that_of_the_stock_model():
    """With every token masked and blocks of one token, both losses are the autoregressive one."""
    model = tiny_decoder("qwen3", context="token", ar_loss_weight=0.5, alignment="shifted", block_size=1).train()
    model.set_interval(1.0, 1.0)
    ids = random_ids()
    loss = model(input_ids=ids, labels=ids, num_items_in_batch=2 * (LENGTH - 1)).loss
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, 1.5 * expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "bd3lm"])
def test_a_next_token_loss_of_clean_text_is_refused(family):
    # TRL's trainers call `base_model` and shift its states by one.
    model = make_family("bd3lm", vocab_size=MASK + 1) if family == "bd3lm" else tiny_decoder(family)
    ids = random_ids()
    with pytest.raises(ValueError, match="block-diffusion.*bd3lm train"):
        model.train().base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    assert torch.isfinite(model(ids, labels=ids).loss)
    model.base_model(input_ids=masked(ids), use_cache=False)
