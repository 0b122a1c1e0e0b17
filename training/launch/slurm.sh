#!/bin/bash
# Training on several machines under Slurm. Adapt the settings below to your cluster, then, from the checkout:
#   sbatch --nodes 2 --gpus-per-node 8 training/launch/slurm.sh training/recipes/demo.yaml --output_dir runs/demo
# Arguments after the script go to training/train.py; with --resume_from_checkpoint true a job continues where the last
# one was cut off. One launcher per machine starts one process per GPU there.
#SBATCH --job-name=bd3lm
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Two minutes before the time is up (or on preemption) a run finishes its step, saves a checkpoint and exits.
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.log
set -euo pipefail

GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
CONFIG="${CONFIG:-training/launch/ddp.yaml}"  # or fsdp2.yaml, deepspeed_zero2.yaml, deepspeed_zero3.yaml
PYTHON="${PYTHON:-python}"                    # of the environment that bd3lm_hf is installed in
PORT="${PORT:-$((29500 + SLURM_JOB_ID % 1000))}"

hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
HEAD_NODE="${hosts%%$'\n'*}"
export HEAD_NODE GPUS_PER_NODE CONFIG PYTHON PORT

# Each machine's own rank is known only inside srun, hence the inner shell.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    exec "$PYTHON" -m accelerate.commands.accelerate_cli launch \
        --config_file "$CONFIG" \
        --num_machines "$SLURM_NNODES" \
        --machine_rank "$SLURM_NODEID" \
        --num_processes "$((SLURM_NNODES * GPUS_PER_NODE))" \
        --main_process_ip "$HEAD_NODE" \
        --main_process_port "$PORT" \
        --rdzv_backend c10d \
        --deepspeed_multinode_launcher standard \
        training/train.py "$@"
' bash "$@"
