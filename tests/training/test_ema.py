import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bd3lm_hf.run_folder import EMA_NAME
from bd3lm_hf.training.ema import AverageCallback, WeightAverage, describe_weights


GOLDEN = Path(__file__).parents[1] / "golden" / "09_ema"


def layer_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2).to(dtype)


def change(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


# The average


@pytest.mark.parametrize(("warmup", "shadow"), [(True, "shadow"), (False, "shadow_const")])
def test_the_average_is_the_published_one(warmup, shadow):
    golden, settings = load_file(GOLDEN / "tensors.safetensors"), json.loads((GOLDEN / "config.json").read_text())
    model = nn.ParameterList([nn.Parameter(golden[f"init.{i}"].clone()) for i in range(2)])
    decay = settings["decay"] if warmup else settings["constant_decay"]
    average = WeightAverage(model, decay=decay, warmup=warmup)
    for update in range(settings["updates"]):
        for i, parameter in enumerate(model):
            parameter.data.copy_(golden[f"params.{i}"][update])
        average.update()
        for i in range(2):
            expected = golden[f"{shadow}.{i}"][update]
            torch.testing.assert_close(average.shadows[str(i)], expected, rtol=1e-6, atol=1e-6)
    assert average.updates == settings["updates"]


def test_the_metadata_of_a_saved_average_is_in_order(tmp_path):
    # Otherwise equal averages have files of another hash: the order of the metadata changes with the process.
    average = WeightAverage(layer_of(), decay=0.99)
    average.save(tmp_path)
    content = (tmp_path / EMA_NAME).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert torch.equal(load_file(tmp_path / EMA_NAME)["weight"], average.shadows["weight"])


def test_warm_up_ends_at_the_decay():
    average = WeightAverage(layer_of(), decay=0.9999)
    assert average.decay_of(1) == 2 / 11
    assert average.decay_of(89_980) < 0.9999
    assert average.decay_of(100_000) == average.decay_of(1_000_000) == 0.9999


def test_low_precision_weights_are_averaged_in_float32():
    model = layer_of(dtype=torch.bfloat16)
    average = WeightAverage(model, decay=0.99, warmup=False)
    start = model.weight.detach().float().clone()
    change(model, 1)
    average.update()
    expected = 0.99 * start + 0.01 * model.weight.detach().float()
    assert average.shadows["weight"].dtype == torch.float32
    torch.testing.assert_close(average.shadows["weight"], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(average.shadows["weight"].bfloat16().float(), average.shadows["weight"])
    raw = model.weight.detach().clone()
    with average.swapped():
        assert torch.equal(model.weight, expected.bfloat16())
    assert torch.equal(model.weight, raw)


def test_only_weights_that_train_are_averaged_and_buffers_stay(tiny_model):
    trainable = [name for name, _ in tiny_model.named_parameters() if "blocks.1" in name]
    for name, parameter in tiny_model.named_parameters():
        parameter.requires_grad_(name in trainable)
    average = WeightAverage(tiny_model, decay=0.9)
    assert list(average.shadows) == trainable
    tiny_model.sampling_eps_min.fill_(0.25)
    average.update()
    with average.swapped():
        assert tiny_model.interval() == (0.25, 1.0)


def test_an_exception_restores_the_weights_bit_for_bit():
    model = layer_of()
    average = WeightAverage(model, decay=0.5)
    change(model, 1)
    average.update()
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}
    shadows = {name: shadow.clone() for name, shadow in average.shadows.items()}
    with pytest.raises(ZeroDivisionError), average.swapped():
        assert all(torch.equal(p, shadows[name]) for name, p in model.named_parameters())
        model.weight.data.zero_()
        1 / 0  # noqa: B018
    assert all(torch.equal(p, raw[name]) for name, p in model.named_parameters())
    assert all(torch.equal(average.shadows[name], shadow) for name, shadow in shadows.items())


@pytest.mark.parametrize("decay", [1.0, -0.1, 0.0, 2])
def test_a_decay_outside_of_zero_to_one_is_refused(decay):
    with pytest.raises(ValueError, match=f"ema_decay={decay}.* between 0 and 1"):
        WeightAverage(layer_of(), decay=decay)


# Its file


def test_an_average_goes_on_bit_for_bit_from_its_file(tmp_path):
    model = layer_of()
    average = WeightAverage(model, decay=0.9)
    for step in range(3):
        change(model, step)
        average.update()
    average.save(tmp_path)
    loaded = WeightAverage(layer_of(7), decay=0.9)
    loaded.load(tmp_path)
    loaded.parameters = average.parameters
    change(model, 9)
    for one in (average, loaded):
        one.update()
    assert loaded.updates == average.updates == 4
    assert all(torch.equal(loaded.shadows[name], shadow) for name, shadow in average.shadows.items())
    with safe_open(tmp_path / EMA_NAME, framework="pt") as file:
        assert file.metadata() == {"updates": "3", "decay": "0.9", "warmup": "true"}


def test_only_the_process_that_should_writes(tmp_path):
    WeightAverage(layer_of(), decay=0.9).save(tmp_path, write=False)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_an_average_is_refused(tmp_path):
    message = r"holds no ema\.safetensors: .* --ema_decay 0\.9 .*--ema_decay 0,"
    with pytest.raises(ValueError, match=message):
        WeightAverage(layer_of(), decay=0.9).load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, r"averages of other weights than this run trains; they differ in bias"),
        (
            {"weight": torch.zeros(5, 3), "bias": torch.zeros(2)},
            r"an average of weight of shape \(5, 3\), but this run trains one of \(2, 3\)",
        ),
    ],
)
def test_the_average_of_another_model_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / EMA_NAME, metadata={"updates": "1"})
    with pytest.raises(ValueError, match=message):
        WeightAverage(layer_of(), decay=0.9).load(tmp_path)


# In a training loop


class _Optimizer:
    step_was_skipped = False


def test_a_step_that_the_loss_scaler_skipped_is_no_update():
    callback, optimizer = AverageCallback(0.9, True), _Optimizer()
    average = callback.start(layer_of())
    callback.on_step_end(None, None, None, optimizer=optimizer)
    optimizer.step_was_skipped = True
    callback.on_step_end(None, None, None, optimizer=optimizer)
    assert average.updates == 1


def test_saved_weights_say_what_they_are():
    average = WeightAverage(layer_of(), decay=0.9999, warmup=False)
    average.update()
    assert describe_weights(None, 5) == {"weights": "raw", "step": 5}
    assert describe_weights(average, 5) == {
        "weights": "average",
        "step": 5,
        "ema_decay": 0.9999,
        "ema_warmup": False,
        "ema_updates": 1,
    }
