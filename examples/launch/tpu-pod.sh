#!/bin/bash
# One process a host of a TPU pod: TPU=my-v5p-128 ZONE=us-east5-a examples/launch/tpu-pod.sh
# JAX finds the hosts by the TPU's metadata. Started again after a failure or a preemption, the run
# goes on. DRY_RUN=1 prints the command and does nothing.
set -euo pipefail

tpu=${TPU:?the name of the TPU}
zone=${ZONE:?its zone}
out=${OUT:?the run\'s folder, on a file system that every host sees}
mesh=${MESH:-fsdp=64}

run="llama-3-8b --data ${DATA:-fineweb.bin} --batch-size 256 --seq-len 4096 --dtype bfloat16"
run+=" --set compute.scan_layers=true --set compute.remat=block --checkpoint-every 500"
command="if [ -f '$out/run.json' ]; then run=--resume; else run='$run'; fi; "
command+="\$HOME/assay/.venv/bin/assay train \$run --mesh $mesh --out '$out' --coordinator auto"

gcloud=(gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$command")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${gcloud[@]}"
  echo
else
  "${gcloud[@]}"
fi
