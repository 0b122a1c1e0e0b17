"""Training on an accelerator, as far as a CPU can show it: no step waits for the device or is compiled again.

The meta device replaces the accelerator: it is not a CPU and has no values, so reading one fails. Where values are
compared, compiled code replaces it: neither branches on values.
"""

from typing import Any

import pytest
import torch
from decoders import random_ids, tiny_decoder
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM
from bd3lm_hf.modeling import backbone_bd3lm
from bd3lm_hf.modeling.attention_bd3lm import flex_tiles
from bd3lm_hf.modeling.backbone_bd3lm import automatic_attention


pytestmark = pytest.mark.usefixtures("fresh_compiler")
SIZES = {"vocab_size": 48, "model_length": 32, "hidden_dim": 32, "cond_dim": 16, "n_blocks": 1, "n_heads": 2}
DOCUMENTS = torch.cat([torch.arange(13), torch.arange(19)]).unsqueeze(0)
PADDING = torch.ones(3, 32, dtype=torch.long)
PADDING[0, :5], PADDING[1, -7:] = 0, 0
INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "text": {},
    "padding": {"attention_mask": PADDING},
    "documents": {"position_ids": DOCUMENTS},
    "both": {"position_ids": DOCUMENTS.expand(3, -1), "attention_mask": PADDING},
    "noise": {"block_noise": torch.rand(3, 8), "token_noise": torch.rand(3, 32), "count_noise": torch.rand(3, 8)},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "bd3lm": {"block_size": 4},
    "bd3lm, several draws": {"block_size": 4, "noise_draws": 2},
    "bd3lm, clipped": {"block_size": 4, "resample": True, "sampling_eps_min": 0.3, "sampling_eps_max": 0.8},
    "bd3lm, exact numbers": {"block_size": 4, "masking": "exact_k"},
    "bd3lm, complementary": {"block_size": 4, "complementary": True},
    "bd3lm, flex": {"block_size": 4, "attn_implementation": "flex_attention"},
    "mdlm": {},
    "ar": {},
}
TWO_LOSSES = {"context": "token", "ar_loss_weight": 0.5, "alignment": "shifted"}


@pytest.fixture
def make(randomize):
    """Return a function that builds a model by name, in train mode."""

    def build(name: str, **fields: Any) -> Any:
        if name == "llama":
            return tiny_decoder("llama", **TWO_LOSSES, **fields, num_hidden_layers=1).train()
        config = CONFIG_MAPPING[name.split(",")[0]](**{**SIZES, "dropout": 0.0, **NETWORKS[name], **fields})
        return randomize(AutoModelForCausalLM.from_config(config)).train()

    return build


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class BlockingCopies(TorchDispatchMode):
    """Record copies from the CPU that the host waits for: those of tensors, since numbers are passed as arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sources = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        moved = isinstance(output, torch.Tensor) and output.is_meta and any(x.is_cpu and x.dim() for x in sources)
        if moved and not (kwargs or {}).get("non_blocking"):
            self.found.append(function._schema.name)
        return output


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", [*(name for name in NETWORKS if "flex" not in name), "llama"])
def test_a_training_step_reads_nothing_from_the_device_and_waits_for_no_copy(make, name, inputs):
    if inputs == "noise" and "bd3lm" not in name:
        pytest.skip("noise of these blocks is that of bd3lm")
    model = make(name)
    model = model.to("meta")
    ids = random_ids(3, 32).to("meta")
    batch = {key: value if "noise" in key else value.to("meta") for key, value in INPUTS[inputs].items()}
    with BlockingCopies() as copies:
        loss = model(input_ids=ids, labels=ids, **batch, num_items_in_batch=torch.tensor(9, device="meta")).loss
        loss.backward()
    assert loss.is_meta and not copies.found
    assert all(parameter.grad is not None for parameter in model.parameters())


def batch_of(model: Any, inputs: str, step: int) -> dict[str, torch.Tensor]:
    """Return a batch of three rows with noise; in documents every token is masked, whatever the noise."""
    ids = random_ids(3, 32, seed=step).clamp(max=46)
    batch = {"input_ids": ids, **{key: value.roll(step, 0) for key, value in INPUTS[inputs].items()}}
    labels = ids.masked_fill(batch.get("attention_mask", torch.ones(())) == 0, -100)
    if model.config.model_type == "ar":
        return {**batch, "labels": labels}
    if "position_ids" in batch:
        model.set_interval(1.0, 1.0)
        return {**batch, "labels": labels}
    blocks, generator = model.config.num_blocks(32), torch.Generator().manual_seed(step)
    shapes = {"block_noise": (3, blocks), "token_noise": (3, 32), "count_noise": (3, blocks)}
    noise = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return {**batch, **noise, "labels": labels}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("bd3lm", "padding"),
        ("bd3lm", "documents"),
        ("bd3lm, flex", "documents"),
        ("ar", "padding"),
        ("llama", "documents"),
        # The other pairs take no other path through the code, and each compiles for seconds.
        pytest.param("bd3lm, flex", "padding", marks=pytest.mark.slow),
        pytest.param("ar", "documents", marks=pytest.mark.slow),
        pytest.param("llama", "padding", marks=pytest.mark.slow),
    ],
)
def test_a_step_is_compiled_once_for_all_batches_and_has_the_loss_and_gradients_of_an_eager_one(make, name, inputs):
    model, has_backward, made = make(name), "flex" not in name, []  # flex has no backward pass on a CPU
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        batch, found = batch_of(model, inputs, step), []
        for run in (compiled, model):
            with torch.set_grad_enabled(has_backward):
                loss = run(**batch).loss
            weights = list(model.parameters()) if has_backward else []
            found.append([loss, *(torch.autograd.grad(loss, weights) if weights else ())])
        made.append(graphs())
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert len(set(made)) == 1


@pytest.mark.parametrize("name", ["bd3lm", pytest.param("bd3lm, flex", marks=pytest.mark.slow)])
def test_another_batch_size_is_compiled_once_more_and_the_first_not_again(make, name):
    model = make(name)
    compiled, batch = torch.compile(model, backend="eager", fullgraph=True), batch_of(model, "padding", 0)
    counts = []
    for rows in (3, 3, 2, 2, 3):
        with torch.no_grad():
            compiled(**{key: value[:rows] for key, value in batch.items()})
        counts.append(graphs())
    assert counts == [1, 1, 2, 2, 2]


def test_a_new_interval_is_compiled_into_the_step(make):
    model, batch = make("bd3lm"), {key: random_ids(3, 32).clamp(max=46) for key in ("input_ids", "labels")}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for number, interval in enumerate([(1e-3, 1.0), (0.3, 0.8), (0.3, 0.8)]):
        model.set_interval(*interval)
        losses = []
        for run in (model, compiled):
            torch.manual_seed(number)
            losses.append(run(**batch).loss.detach())
        torch.testing.assert_close(*losses)
        assert graphs() == min(number + 1, 2)


@pytest.mark.parametrize(
    ("capability", "queries", "head_dim", "dtype", "chosen"),
    [
        ((9, 0), 128, 64, torch.bfloat16, True),
        ((8, 0), 128, 64, torch.bfloat16, False),
        ((9, 0), 127, 64, torch.bfloat16, False),
        ((9, 0), 128, 32, torch.bfloat16, False),
        ((9, 0), 128, 64, torch.float32, False),
    ],
)
def test_tiles_are_chosen_only_where_they_were_measured(monkeypatch, capability, queries, head_dim, dtype, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    query, value = torch.empty(1, 1, queries, head_dim), torch.empty(1, 1, 128, head_dim, dtype=dtype)
    assert (flex_tiles(query, value) is not None) == chosen


@pytest.mark.parametrize(("cuda", "triton"), [(True, True), (True, False), (False, True)])
def test_auto_is_flex_attention_on_cuda_where_it_has_a_kernel_and_sdpa_elsewhere(monkeypatch, cuda, triton):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(backbone_bd3lm, "is_triton_available", lambda: triton)
    wide = BD3LMForMaskedLM._from_config(BD3LMConfig(**SIZES), attn_implementation="auto")
    narrow = BD3LMForMaskedLM._from_config(BD3LMConfig(**SIZES | {"n_heads": 4}), attn_implementation="auto")
    decoder = tiny_decoder("llama", attention="auto")  # 8 wide
    found = [model.config._attn_implementation for model in (wide, narrow, decoder)]
    assert found == ["flex_attention" if cuda and triton else "sdpa", "sdpa", "sdpa"]


@pytest.mark.parametrize("name", ["bd3lm", "llama"])
def test_auto_is_accepted_wherever_an_implementation_is_and_never_overrides_another(make, name, tmp_path):
    make(name).save_pretrained(tmp_path)
    for asked in ("auto", "eager", "sdpa", None):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=asked)
        assert model.config._attn_implementation == (automatic_attention(16) if asked == "auto" else asked or "sdpa")
    model.set_attn_implementation("eager")
    model.set_attn_implementation("auto")
    assert model.config._attn_implementation == automatic_attention(16)
