#!/usr/bin/env bash
# Hosts without a scheduler: run the same line on every host. They find each other at ALIGNVLM_RENDEZVOUS (host:port on
# one of them); a failed rank restarts all of them from the newest checkpoint. Variables: docs/clusters.md.
#   ALIGNVLM_NODES=2 ALIGNVLM_RENDEZVOUS=host1:29400 launch/torchrun.sh RECIPE [key=value ...]
# A signal stops the job with everything saved and exit code 75.
set -uo pipefail

python=${ALIGNVLM_PYTHON:-python3}
processes=${ALIGNVLM_PROCESSES:-1}
if [[ -z ${ALIGNVLM_PROCESSES:-} && -n ${CUDA_VISIBLE_DEVICES-all} ]] && compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
    processes=gpu
fi
if [[ -n ${ALIGNVLM_INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=$ALIGNVLM_INTERFACE GLOO_SOCKET_IFNAME=$ALIGNVLM_INTERFACE
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${ALIGNVLM_GRACE:-300} # torch before 2.12 knows only 30 s
if [[ -z ${OMP_NUM_THREADS:-} ]]; then # the CPUs, shared among the processes: an optimizer on the CPU needs them
    count=$processes
    if ! [[ $count =~ ^[0-9]+$ ]]; then # gpu, auto: one per GPU
        count=$(compgen -G '/dev/nvidia[0-9]*' | wc -l)
        [[ -n ${CUDA_VISIBLE_DEVICES:-} ]] && count=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    fi
    cpus=$(nproc)
    OMP_NUM_THREADS=$((count > 0 && cpus > count ? cpus / count : 1))
fi
export OMP_NUM_THREADS NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# A mistake in the recipe is said once, and not by every rank at every restart.
"$python" -m alignvlm train --dry-run "$@" >/dev/null || exit

export ALIGNVLM_END_WITH_PARENT=1 # ranks end with torchrun, and torchrun with this script where `setpriv` can do that
tied=()
setpriv --pdeathsig KILL true 2>/dev/null && tied=(setpriv --pdeathsig KILL)

signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
[[ -n $(trap -p HUP) ]] || signals+=,SIGHUP # ignored under nohup

asked=0
"${tied[@]}" "$python" -m torch.distributed.run \
    --nnodes="${ALIGNVLM_NODES:-1}" --nproc-per-node="$processes" \
    --rdzv-backend=c10d --rdzv-endpoint="${ALIGNVLM_RENDEZVOUS:-localhost:29400}" --rdzv-id="${ALIGNVLM_JOB:-alignvlm}" \
    --max-restarts="${ALIGNVLM_MAX_CRASHES:-3}" \
    --signals-to-handle="$signals" \
    -m alignvlm train "$@" &
trap 'asked=1; kill -TERM $! 2>/dev/null; kill -CONT $! 2>/dev/null' TERM INT HUP QUIT USR1
wait $!
code=$?
while ((code > 128)) && kill -0 $! 2>/dev/null; do
    wait $!
    code=$?
done
((asked && code != 0)) && exit 75
exit "$code"
