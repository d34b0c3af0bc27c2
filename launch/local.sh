#!/usr/bin/env bash
# One machine without a scheduler: one process per GPU (or as many as the recipe says), started again after a crash or
# a hang, up to ALIGNVLM_MAX_CRASHES times in a row. A signal stops it with everything saved and exit code 75.
#   launch/local.sh RECIPE [key=value ...]
set -uo pipefail

python=${ALIGNVLM_PYTHON:-python3}
gpus=$(compgen -G '/dev/nvidia[0-9]*' | wc -l)
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
fi
if ((gpus > 0)) && [[ " $*" != *' train.processes='* ]]; then
    set -- "$@" "train.processes=$gpus"
fi
asked=0
crashes=0
while :; do
    "$python" -m alignvlm train "$@" &
    trap 'asked=1; kill -TERM $! 2>/dev/null' TERM INT USR1
    wait $!
    code=$?
    while ((code > 128)) && kill -0 $! 2>/dev/null; do
        wait $!
        code=$?
    done
    ((code == 0 || code == 2)) && exit "$code" # finished, or a user's mistake
    ((asked)) && exit 75
    if ((code == 75)); then
        crashes=0
    elif ((++crashes > ${ALIGNVLM_MAX_CRASHES:-3})); then
        exit "$code"
    fi
    echo "$(date +%FT%T) exit code $code: starting again" >&2
    sleep 1
done
