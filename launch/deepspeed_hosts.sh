#!/usr/bin/env bash
# Hosts of a DeepSpeed hostfile ("host1 slots=8" a line). Over ssh, from any one of them (needs pdsh):
#   launch/deepspeed_hosts.sh HOSTFILE RECIPE [key=value ...]
# Without ssh, the same line on every host with its place in the file, counted from 0:
#   ALIGNVLM_NODE_RANK=1 launch/deepspeed_hosts.sh HOSTFILE RECIPE [key=value ...]
# A signal stops the job with everything saved and exit code 75. Variables: docs/clusters.md.
set -euo pipefail

python=${ALIGNVLM_PYTHON:-python3}
hostfile=${1:?usage: deepspeed_hosts.sh HOSTFILE RECIPE [key=value ...]}
shift
first=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$hostfile")
options=(--hostfile "$hostfile" --master_addr "${ALIGNVLM_MASTER:-$first}" --master_port "${ALIGNVLM_PORT:-29500}")
if [[ -n ${ALIGNVLM_NODE_RANK:-} ]]; then
    options+=(--no_ssh --node_rank "$ALIGNVLM_NODE_RANK")
else
    options+=(--launcher pdsh --force_multi)
fi
if [[ -n ${ALIGNVLM_INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=$ALIGNVLM_INTERFACE GLOO_SOCKET_IFNAME=$ALIGNVLM_INTERFACE
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then # the CPUs of this host, shared among the processes of the first one
    slots=$(awk '!/^[[:space:]]*(#|$)/ && match($0, /slots=[0-9]+/) { print substr($0, RSTART + 6, RLENGTH - 6); exit }' "$hostfile")
    slots=${slots:-1}
    OMP_NUM_THREADS=$(($(nproc) > slots ? $(nproc) / slots : 1))
fi
export OMP_NUM_THREADS NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# A mistake in the recipe is said once, and not by every rank.
"$python" -m alignvlm train --dry-run "$@" >/dev/null

export ALIGNVLM_END_WITH_PARENT=1 # ranks end with DeepSpeed's launcher on their host

# Over ssh DeepSpeed hands on only a few variables, and those of this file.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
for name in $(compgen -e | grep -E '^(ALIGNVLM|GLOO|HF|MLFLOW|NCCL|TORCH)_|^(CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS)$'); do
    printf '%s=%q\n' "$name" "${!name}" >>"$DS_ENV_FILE"
done

set +e -m # a process group of its own: DeepSpeed's launcher does not hand signals on to its children
"$python" -m deepspeed.launcher.runner "${options[@]}" --no_local_rank --module alignvlm train "$@" &
asked=0
trap 'asked=1; kill -TERM -- -$! 2>/dev/null; kill -CONT -- -$! 2>/dev/null' TERM INT HUP USR1
wait $!
code=$?
while ((code > 128)) && kill -0 $! 2>/dev/null; do
    wait $!
    code=$?
done
((asked && code != 0)) && exit 75
exit "$code"
