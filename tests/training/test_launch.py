"""The files in training/launch/, read by accelerate's own code; stand-ins for Slurm run its script."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import TrainingArguments

from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.ema import prepare_fsdp


LAUNCH = Path(__file__).resolve().parents[2] / "training" / "launch"
TYPES = {
    "single": (DistributedType.NO, "no"),
    "cpu2": (DistributedType.MULTI_GPU, "no"),
    "ddp": (DistributedType.MULTI_GPU, "bf16"),
    "fsdp2": (DistributedType.FSDP, "bf16"),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, "bf16"),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, "bf16"),
}


def read(name: str):
    """Return what `accelerate launch` makes of a configuration: its arguments and the file's own fields."""
    words = ["--config_file", str(LAUNCH / f"{name}.yaml"), "--main_process_port", "0", "train.py"]
    arguments, configuration, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments, configuration


def test_every_configuration_is_tested():
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_the_configuration_which_says_how_it_is_started(name):
    arguments, configuration = read(name)
    assert (configuration.distributed_type, arguments.mixed_precision) == TYPES[name]
    assert arguments.use_fsdp == (name == "fsdp2")
    assert arguments.use_deepspeed == name.startswith("deepspeed")
    assert configuration.num_machines == 1
    text = (LAUNCH / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"accelerate launch --config_file training/launch/{name}.yaml" in text.replace("#   ", "")


def test_fsdp2_shards_layers_and_saves_what_can_be_resumed(monkeypatch):
    environment = prepare_multi_gpu_env(read("fsdp2")[0])
    for name in environment:
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, environment[name])
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None  # so the model's own are used
    assert BD3LMForMaskedLM._no_split_modules == ["BD3LMBlock"]
    prepare_fsdp(plugin)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_what_a_run_decides_from_the_run(monkeypatch, stage):
    arguments, configuration = read(f"deepspeed_zero{stage}")
    arguments.deepspeed_fields_from_accelerate_config = ",".join([*configuration.deepspeed_config, "mixed_precision"])
    environment = prepare_deepspeed_cmd_env(arguments)[1]
    for name in environment:
        if "DEEPSPEED" in name or name.startswith("ACCELERATE_GRADIENT"):
            monkeypatch.setenv(name, environment[name])
    plugin = DeepSpeedPlugin()
    settings = plugin.deepspeed_config
    assert settings["zero_optimization"]["stage"] == plugin.zero_stage == stage
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert settings[name] == "auto"
    assert settings["gradient_clipping"] == "auto"
    assert not plugin.zero3_init_flag
    expected = "BD3LMBlock" if stage == 3 else None
    assert environment.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES") == expected


@pytest.mark.parametrize(("deepspeed", "precision", "bf16"), [("true", "bf16", 1), ("true", "no", 0), ("", "bf16", 0)])
def test_under_deepspeed_the_launchers_precision_is_the_runs(monkeypatch, tmp_path, deepspeed, precision, bf16):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", deepspeed or "false")
    # transformers itself would require the deepspeed package.
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(BD3LMTrainingArguments, "world_size", 1)
    fields = {"output_dir": str(tmp_path), "report_to": [], "accelerator_config": SimpleNamespace(split_batches=False)}
    assert bool(BD3LMTrainingArguments(**fields).bf16) == bool(bf16)


SCRIPT = LAUNCH / "slurm.sh"


def test_the_slurm_script_names_no_cluster():
    text = SCRIPT.read_text(encoding="utf-8")
    for word in ("--partition", "--account", "--constraint", "--mail", "/home", "/scratch", "module load", "conda"):
        assert word not in text


def test_the_slurm_script_starts_one_launcher_per_machine(tmp_path):
    stand_ins = {
        "scontrol": "printf 'first\\nsecond\\n'",
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "python": 'printf "%s\\n" "$*"',
    }
    for name, body in stand_ins.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "first,second", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "7"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    words = ["bash", str(SCRIPT), "recipe.yaml", "--sample_prompt", "two words"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.startswith("-m accelerate.commands.accelerate_cli launch --config_file training/launch/ddp.yaml")
        given = f"--num_machines 2 --machine_rank {rank} --num_processes 8 --main_process_ip first"
        assert f"{given} --main_process_port 29507" in line
        assert line.endswith("training/train.py recipe.yaml --sample_prompt two words")
    parsed = launch_command_parser().parse_args(lines[0].split()[3:])
    assert (parsed.num_machines, parsed.num_processes, parsed.rdzv_backend) == (2, 8, "c10d")
