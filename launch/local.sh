#!/usr/bin/env bash
# One machine without a scheduler: one process per GPU (or as many as the recipe says), started again after a crash or
# a hang, up to ALIGNVLM_MAX_CRASHES times in a row; one that comes after ALIGNVLM_CRASH_MINUTES is the first of a new
# row. A signal stops it with everything saved and exit code 75; when this script is killed, so is the job.
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
export ALIGNVLM_END_WITH_PARENT=1
asked=0
crashes=0
job=
stop() {
    asked=1
    if [[ -n $job ]]; then
        kill -TERM "$job" 2>/dev/null
        kill -CONT "$job" 2>/dev/null # also when it was stopped
    fi
}
trap stop TERM INT HUP USR1
while ((!asked)); do
    began=$SECONDS
    "$python" -m alignvlm train "$@" &
    job=$!
    ((asked)) && stop
    wait $job
    code=$?
    while ((code > 128)) && kill -0 $job 2>/dev/null; do
        wait $job
        code=$?
    done
    job=
    ((code == 0 || code == 2)) && exit "$code" # finished, or a user's mistake
    ((asked)) && break
    ((code == 75 || SECONDS - began >= 60 * ${ALIGNVLM_CRASH_MINUTES:-60})) && crashes=0
    ((code == 75 || ++crashes <= ${ALIGNVLM_MAX_CRASHES:-3})) || exit "$code"
    echo "$(date +%FT%T) exit code $code: starting again" >&2
    ((SECONDS - began >= 10)) || sleep 1 # only one that ended at once may do so again and again
done
exit 75
