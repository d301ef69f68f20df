#!/bin/bash
# One process a GPU on Slurm: sbatch examples/launch/slurm.sh
# JAX finds the processes by Slurm's own variables. Two minutes before the time is up all of them
# get SIGTERM, save and end; the job is then queued again, and goes on.
#SBATCH --job-name=assay
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=assay-%j.log
set -euo pipefail

out=${OUT:-runs/llama-3-8b}  # on a file system that every node sees
run=(llama-3-8b --data "${DATA:-fineweb.bin}" --batch-size 256 --seq-len 4096 --dtype bfloat16)
run+=(--set compute.scan_layers=true --set compute.remat=block --checkpoint-every 500)
if [[ -f $out/run.json ]]; then run=(--resume); fi

# Since Slurm 22.05 srun takes the CPUs of a task from its own flag alone.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
  assay train "${run[@]}" --mesh fsdp=32 --out "$out" --coordinator auto

if [[ ! -f $out/result.json ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
