#!/bin/bash
# Several processes of one run on this machine: local.sh N, then what `assay train` takes.
#
#   examples/launch/local.sh 2 nano --data python-docs --steps 100 --mesh data=2 --out runs/two
#
# SIGTERM or Ctrl-C reaches all of them: they save together and end. When one fails the others end
# by themselves; what still stands GRACE seconds later (it hangs) is killed. ASSAY names the command
# and PORT where the processes meet.
set -uo pipefail

n=${1:-}
if [[ ! $n =~ ^[1-9][0-9]*$ ]]; then
  echo "local.sh: PROCESSES: found '$n', expected a number of at least 1;" \
    "usage: local.sh PROCESSES ARGUMENTS-OF-ASSAY-TRAIN." >&2
  exit 2
fi
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
left=("${pids[@]}")
while ((${#left[@]})); do
  wait -n "${left[@]}"  # or until a signal
  standing=()
  for pid in "${left[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      standing+=("$pid")
      continue
    fi
    wait "$pid"
    code=$?
    if ((code && !status && n > 1)); then
      again=" Start all of them again with --resume: they go on from the newest checkpoint."
      # What it was told cannot be done, or there is no such command: it says why.
      ((code == 2 || code == 126 || code == 127)) && again=""
      echo "local.sh: a process ended with status $code, so the run ends.$again" >&2
      (sleep "${GRACE:-45}"; kill -KILL "${pids[@]}") &> /dev/null &
      killer=$!
    fi
    ((code > status)) && status=$code
  done
  left=("${standing[@]}")
done
[[ -n ${killer:-} ]] && kill "$killer" 2>/dev/null
exit "$status"
