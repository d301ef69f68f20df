#!/bin/bash
# Several processes of one run on this machine: local.sh N, then what `assay train` takes.
#
#   examples/launch/local.sh 2 nano --data python-docs --steps 100 --mesh data=2 --out runs/two
#
# SIGTERM or Ctrl-C reaches all of them: they save together and end. ASSAY names the command and
# PORT where the processes meet.
set -uo pipefail

n=${1:?usage: local.sh PROCESSES ARGUMENTS-OF-ASSAY-TRAIN}
shift
assay=${ASSAY:-assay}
port=${PORT:-$((20000 + RANDOM % 20000))}

pids=()
for ((i = 0; i < n; i++)); do
  $assay train "$@" --coordinator "127.0.0.1:$port" --processes "$n" --process-id "$i" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

status=0
for pid in "${pids[@]}"; do
  while true; do  # a signal ends `wait` before the process has ended
    wait "$pid"
    code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  ((code > status)) && status=$code
done
exit "$status"
