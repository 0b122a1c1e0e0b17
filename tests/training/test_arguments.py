import pytest
import torch

from bd3lm_hf.training.arguments import REFUSED_FIELDS, BD3LMTrainingArguments, ModelArguments
from bd3lm_hf.training.initial_model import trains_by_flex


def arguments_of(folder, **fields) -> BD3LMTrainingArguments:
    defaults = {"output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 8}
    return BD3LMTrainingArguments(**{**defaults, **fields})


def test_defaults_are_the_optimisation_of_the_paper():
    training = BD3LMTrainingArguments()
    schedule = (training.learning_rate, training.warmup_steps, training.lr_scheduler_type)
    assert schedule == (3e-4, 2500, "constant_with_warmup")
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (training.weight_decay, training.max_grad_norm) == (0.0, 1.0)


def test_gradient_checkpointing_is_the_name_in_every_version_of_transformers(tmp_path, recwarn):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    training = arguments_of(tmp_path, **settings)
    assert training.gradient_checkpointing and training.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_a_gpu_gets_asynchronous_copies_and_a_fused_optimizer(tmp_path):
    training = arguments_of(tmp_path, use_cpu=False)
    assert training.dataloader_pin_memory and training.accelerator_config.non_blocking
    assert training.optim == "adamw_torch_fused"
    assert not arguments_of(tmp_path).accelerator_config.non_blocking  # a CPU needs no copy
    chosen = arguments_of(tmp_path, use_cpu=False, accelerator_config={"non_blocking": False})
    assert not chosen.accelerator_config.non_blocking


@pytest.mark.parametrize(
    ("device", "model_type", "expected"),
    [("cuda", "bd3lm", True), ("cuda", "ar", True), ("cuda", "ssdlm", False), ("cpu", "bd3lm", False)],
)
def test_training_on_cuda_chooses_flex_attention_by_itself(device, model_type, expected):
    assert ModelArguments().attn_implementation == "auto"
    assert trains_by_flex(model_type, torch.device(device)) is expected


REPLACING = {"label_smoothing_factor": 0.1, "use_liger_kernel": True, "neftune_noise_alpha": 5.0}
REPLACING |= {"average_tokens_across_devices": False, "train_sampling_strategy": "group_by_length"}
REPLACING |= {"dataloader_drop_last": True, "bf16_full_eval": True, "batch_eval_metrics": True}
REPLACING |= {"label_names": ["targets"], "auto_find_batch_size": True, "debug": "underflow_overflow"}


@pytest.mark.parametrize(("field", "value"), REPLACING.items())
def test_a_field_that_would_replace_the_loss_or_has_no_effect_is_refused(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"--{field} "):
        arguments_of(tmp_path, **{field: value})


def test_the_defaults_of_transformers_are_not_refused():
    defaults = {name: getattr(BD3LMTrainingArguments, name, None) for name in REFUSED_FIELDS}
    assert all(default in REFUSED_FIELDS[name][0] for name, default in defaults.items() if default is not None)


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"global_batch_size": 16, "gradient_accumulation_steps": 3}, "--gradient_accumulation_steps 3.*16, .* 2"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True .*--global_batch_size"),
        ({"ema_decay": 1.0}, r"--ema_decay 1\.0"),
        ({"ema_decay": -0.5}, r"--ema_decay -0\.5"),
        ({"peak_tflops": 0.0}, r"--peak_tflops 0\.0"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "_kwargs .*cosine.*'cycles'"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "--lr_scheduler_kwargs .*'cycles'.* constant_with_warmup"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_kwargs .*min_lr_rate"),
        ({"peak_tflops": float("nan")}, "--peak_tflops nan"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path, fields, value):
    with pytest.raises(ValueError, match=value):
        arguments_of(tmp_path, **fields)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(BD3LMTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs.*accelerate launch"):
        arguments_of(tmp_path)


def test_a_step_is_not_compiled_by_a_torch_that_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.7.1+cu126"))
    with pytest.raises(ValueError, match=r"--torch_compile needs torch 2.8.*2\.7\.1\+cu126"):
        BD3LMTrainingArguments(output_dir=str(tmp_path), torch_compile=True)


def test_processes_that_would_each_train_alone_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ValueError, match="2 processes .* 1.*--use_cpu"):
        BD3LMTrainingArguments(output_dir=str(tmp_path))


def test_a_reporter_must_be_installed(monkeypatch):
    installed = "bd3lm_hf.training.arguments.get_available_reporting_integrations"
    monkeypatch.setattr(installed, lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="--report_to wandb: not installed.*tensorboard, none"):
        BD3LMTrainingArguments(report_to="wandb")
    with pytest.raises(ValueError, match="--report_to wandbb"):
        BD3LMTrainingArguments(report_to="wandbb")
    assert BD3LMTrainingArguments(report_to="tensorboard").report_to == ["tensorboard"]
    monkeypatch.setattr(installed, lambda: ["tensorboard", "wandb"])
    assert BD3LMTrainingArguments(report_to=["tensorboard", "wandb"]).report_to == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("processes", "device", "accumulated"), [(1, 8, 64), (8, 16, 4), (32, 16, 1), (1, 512, 1), (4, 128, 1)]
)
def test_the_global_batch_decides_the_accumulation(tmp_path, processes, device, accumulated):
    # Two processes of a real run are in two_processes.py.
    arguments = arguments_of(tmp_path, per_device_train_batch_size=device)
    arguments.global_batch_size = 512
    assert arguments._accumulation(processes) == accumulated
    for agreeing in (1, 512 // device):
        batch = {"global_batch_size": 512, "gradient_accumulation_steps": agreeing}
        alone = arguments_of(tmp_path, per_device_train_batch_size=device, **batch)
        assert alone.gradient_accumulation_steps == 512 // device


@pytest.mark.parametrize(
    ("processes", "device", "requested", "nearest"),
    [(3, 8, 512, 504), (8, 128, 512, 1024), (1, 8, 0, 8), (2, 4, 12, 16)],
)
def test_a_global_batch_that_does_not_divide_names_the_nearest(tmp_path, processes, device, requested, nearest):
    arguments = arguments_of(tmp_path, per_device_train_batch_size=device)
    arguments.global_batch_size = requested
    with pytest.raises(ValueError, match=f"--global_batch_size {requested} .* {nearest}"):
        arguments._accumulation(processes)
