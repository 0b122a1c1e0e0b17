"""Weights sharded over two processes; the runs themselves are in `two_processes.py`."""

import filecmp
import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from decoders import random_ids
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from two_processes import BATCH, DECODERS, STEPS, decoder, one_pass, scores, tiny_model, train

from bd3lm_hf.modeling.layers_bd3lm import call_as, is_sharded
from bd3lm_hf.modeling.loss_bd3lm import chunked_cross_entropy
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.training.ema import has_shards, local_part, part_like, prepare_fsdp, whole, whole_model


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder and the results of the same run in one process, four batches of 2 accumulated."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder, per_device_train_batch_size=2)


def test_a_number_that_is_not_finite_in_the_part_of_one_process_is_found_by_both(two_processes):
    for result in two_processes[1]:
        assert "1 of 768 values of backbone.blocks.0.attn_qkv.weight in a shard are NaN" in result["not finite"]


@pytest.mark.parametrize("family", DECODERS)
def test_a_sharded_decoder_has_the_losses_and_the_gradients_of_the_whole_one(two_processes, family):
    model, results = decoder(family), [result["decoders"][family] for result in two_processes[1]]
    close((results[0]["loss"] + results[1]["loss"]) / 2, one_pass(model, slice(0, BATCH), 1, random_ids(BATCH)))
    for name, parameter in model.named_parameters():
        for result in results:
            close(result["gradients"][name], parameter.grad, 1e-5)
    nll = model.eval().token_nll(random_ids(2), estimator="exact").nll
    for result in results:
        close(result["nll"], nll.detach(), 1e-5)


def test_a_sharded_run_takes_the_same_steps(two_processes, alone):
    for result in two_processes[1]:
        fsdp = result["fsdp"]
        assert (fsdp["world_size"], fsdp["accumulation"], fsdp["sharded"]) == (2, 2, True)
        for key in ("loss", "eval_nll", "grad_norm"):
            assert fsdp[key] == pytest.approx(alone[1][key], abs=1e-5), key
        assert fsdp["interval"] == alone[1]["interval"] != (1e-3, 1.0)
        for name, average in alone[1]["average"].items():
            close(fsdp["average"][name], average)


def test_a_sharded_run_saves_the_weights_and_the_files_of_a_whole_one(two_processes, alone):
    sharded, plain = two_processes[0] / "fsdp", alone[0]
    for name in ("model.safetensors", f"checkpoint-{STEPS}/model.safetensors"):
        saved, expected = load_file(sharded / name), load_file(plain / name)
        assert saved.keys() == expected.keys()
        for key, tensor in expected.items():
            close(saved[key], tensor)
        assert BD3LMForMaskedLM.from_pretrained((sharded / name).parent).config.block_size == 4
    # The files of the search contain numbers and times of their own run.
    names = {path.name for path in plain.iterdir() if path.is_file() and "interval_search" not in path.name}
    assert names <= {path.name for path in sharded.iterdir()}
    for name in names - {"model.safetensors", "training_args.bin"}:
        assert filecmp.cmp(sharded / name, plain / name, shallow=False), name
    assert json.loads((sharded / "config.json").read_text())["architectures"] == ["BD3LMForMaskedLM"]
    assert "samples.txt" in names and (sharded / "samples.txt").read_text().count("--- sample at step") == 2


def test_a_sharded_run_resumes_bit_for_bit(two_processes):
    folder, results = two_processes
    for result in results:
        assert result["resumed"]["loss"] == result["fsdp"]["loss"]
    for name in ("model.safetensors", f"checkpoint-{STEPS}/model.safetensors", f"checkpoint-{STEPS}/ema.safetensors"):
        whole_run, resumed = (load_file(folder / run / name) for run in ("fsdp", "resumed"))
        assert all(torch.equal(resumed[key], tensor) for key, tensor in whole_run.items()), name


def test_low_precision_is_close_and_keeps_noise_loss_and_saved_weights_in_float32(two_processes, alone):
    folder, results = two_processes
    for result in results:
        bf16 = result["bf16"]
        assert bf16["dtypes"] == {torch.float32}
        assert bf16["loss"][0] == pytest.approx(alone[1]["loss"][0], rel=2e-3)
        assert bf16["loss"][0] != alone[1]["loss"][0]
        for key, noise in bf16["seen"].items():
            for name, drawn in noise.items():
                assert torch.equal(drawn, alone[1]["seen"][key][name])
    weights = load_file(folder / "bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_an_unsharded_model_is_its_own_part_and_whole():
    model = tiny_model()
    weight = next(model.parameters())
    assert not has_shards(model) and not local_part(weight).requires_grad
    assert local_part(weight).data_ptr() == weight.data_ptr()
    assert part_like(weight, weight).data_ptr() == whole(weight, weight).data_ptr() == weight.data_ptr()
    layer = nn.Linear(2, 2)
    assert not is_sharded(layer)
    layer.weight.ds_id = 7  # as ZeRO-3 marks it
    assert is_sharded(layer) and not is_sharded(nn.Sequential(layer))


def test_a_copy_is_equal_and_shares_nothing():
    model = tiny_model().eval()
    with pytest.raises(ValueError, match="Linear .*DDP"):
        whole_model(nn.Linear(2, 2))
    copy = whole_model(model)
    assert type(copy) is type(model)
    assert torch.equal(scores(copy), scores(model))
    assert copy.generation_config is model.generation_config
    for (name, one), other in zip(model.state_dict().items(), copy.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
        assert one.data_ptr() != other.data_ptr(), name


def test_weights_that_zero_3_shards_are_gathered_for_a_copy(monkeypatch):
    model = tiny_model().eval()
    expected, spread = scores(model), model.backbone.blocks[0].attn_qkv.weight
    values, spread.data, spread.ds_id, gathered = spread.data, torch.empty(0), 3, []

    @contextmanager
    def gather(parameters):
        gathered.extend(parameters)
        spread.data = values.clone()
        yield
        spread.data.zero_()
        spread.data = torch.empty(0)

    # `deepspeed.zero` is a name in the package, not a module that could be imported.
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gather)))
    assert has_shards(model)
    copy = whole_model(model)
    assert len(gathered) == 1 and not has_shards(copy)
    assert torch.equal(scores(copy), expected)


def test_a_function_takes_the_place_of_forward_within_the_hooks():
    layer, order = nn.Linear(2, 2), []
    layer.register_forward_pre_hook(lambda *arguments: order.append("before"))
    layer.register_forward_hook(lambda *arguments: order.append("after"))
    x = torch.ones(1, 2)
    assert call_as(layer, lambda x: (order.append("within"), x + 1)[1], x).tolist() == [[2.0, 2.0]]
    assert order == ["before", "within", "after"]
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with pytest.raises(ZeroDivisionError):
        call_as(layer, lambda x: 1 / 0, x)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("rows", [0, 5])
def test_a_sharded_head_is_called_once_for_all_chunks(monkeypatch, rows):
    monkeypatch.setattr("bd3lm_hf.modeling.loss_bd3lm._LOGIT_BUDGET", 20)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 4, generator=generator)
    targets, weights = torch.randint(0, 9, (rows,), generator=generator), torch.rand(rows, generator=generator)
    losses, calls = [], []
    for sharded in (False, True):
        torch.manual_seed(0)
        head = nn.Linear(4, 10)
        if sharded:
            head.weight.ds_id = 0
            head.register_forward_pre_hook(lambda *arguments: calls.append(1))
        loss = chunked_cross_entropy(hidden, head, targets, weights, SimpleNamespace(vocab_size=10, mask_token_id=9))
        loss.backward()
        losses.append((loss.detach(), head.weight.grad))
    assert len(calls) == 1
    close(losses[0][0], losses[1][0])
    close(losses[0][1], losses[1][1])


def test_a_sharded_model_folds_its_modulations_layer_by_layer():
    model = tiny_model().eval()
    expected = scores(model)
    with torch.no_grad():
        assert isinstance(model.backbone.modulations(None, torch.device("cpu"))[0], tuple)
    model.backbone.blocks[1].unshard = lambda: None  # as FSDP2 marks the modules it manages
    with torch.no_grad():
        assert isinstance(model.backbone.modulations(None, torch.device("cpu"))[0], torch.Tensor)
    close(scores(model), expected)


def test_the_old_fsdp_is_refused_and_noise_loss_and_sums_of_gradients_stay_in_float32():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match=r"fsdp_version 1 is not supported: use 2, as in training/launch/fsdp2\.yaml"):
        prepare_fsdp(plugin)
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=low)
    prepare_fsdp(plugin)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=None)
    prepare_fsdp(plugin)
    assert plugin.mixed_precision_policy is None
