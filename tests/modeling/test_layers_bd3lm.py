"""Layers are called, never read: quantized, pruned, offloaded and exported models compute what the plain one does."""

import copy
import os
import stat

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from generating import make_family
from torch import nn
from torch.export import Dim
from torch.nn.utils import prune
from transformers import AutoModelForMaskedLM


IDS = torch.tensor([[0, 5, 6, 7, 8, 9, 47, 11]])
TEXT = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 11]])


def pruned(model, folder):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune.identity(module, "weight")
    return model


CPU = torch.device("cpu")
CHANGES = {
    "quantized": lambda model, folder: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8),
    "pruned": pruned,
    "on disk": lambda model, folder: disk_offload(model, str(folder / "weights"), execution_device=CPU),
    "on cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("time_conditioning", [False, True])
def test_a_model_with_other_layers_computes_the_same(make_model, tmp_path, change, time_conditioning):
    plain = make_model(time_conditioning=time_conditioning)
    model = CHANGES[change](copy.deepcopy(plain), tmp_path)
    levels = {"timesteps": torch.tensor([0.5])}
    with torch.no_grad():
        expected = plain(IDS, **levels).logits
        error = (model(IDS, **levels).logits - expected).norm() / expected.norm()
    assert error <= (0.1 if change == "quantized" else 0)
    assert model.generate(TEXT, max_new_tokens=5).shape[1] <= 13
    assert torch.isfinite(model.token_nll(TEXT).nll).all()
    assert torch.isfinite(model.train()(TEXT, labels=TEXT).loss)


def test_layers_never_get_zero_rows(make_model):
    model, sizes = make_model(), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    nothing = torch.full_like(TEXT, -100)
    model(TEXT, labels=nothing)
    model.generate(TEXT.repeat(1, 2), max_new_tokens=5)
    model.token_nll(TEXT, estimator="exact")
    assert sizes and all(sizes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bd3lm", "ar", "mdlm"])
def test_an_exported_or_traced_model_serves_other_batches_lengths_and_padding(family):
    model, ids, dynamic = make_family(family, model_length=32), IDS.repeat(2, 1), {0: Dim.AUTO, 1: Dim.AUTO}
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = dict.fromkeys(arguments, dynamic)
    exported = torch.export.export(model, (), arguments, dynamic_shapes=shapes).module()
    with torch.no_grad():
        traced = torch.jit.trace(model, tuple(arguments.values()), strict=False, check_trace=False)
    others, padded = IDS.repeat(3, 2), torch.ones(3, 16, dtype=torch.long)
    padded[0, :3] = 0
    expected = model(others, attention_mask=padded).logits[padded.bool()]
    for output in (exported(input_ids=others, attention_mask=padded), traced(others, padded)):
        torch.testing.assert_close(output["logits"][padded.bool()], expected)


def test_a_saved_folder_has_the_permissions_of_the_umask_and_at_most_twenty_code_files_and_loads(make_model, tmp_path):
    old = os.umask(0o022)
    try:
        make_model().save_pretrained(tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o644
    assert len(list(tmp_path.glob("*.py"))) <= 20
    assert AutoModelForMaskedLM.from_pretrained(tmp_path)(IDS).logits.shape == (1, 8, 48)
