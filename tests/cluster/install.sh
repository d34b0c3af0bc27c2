#!/usr/bin/env bash
# What the tests marked `cluster` need from the system: Slurm, munge, ssh, pdsh, network namespaces. Debian or Ubuntu, as root.
set -euo pipefail

programs=(slurmctld slurmd munged sshd pdsh ip nsenter unshare)
missing=()
for program in "${programs[@]}"; do
    command -v "$program" >/dev/null || [[ -x /usr/sbin/$program ]] || missing+=("$program")
done
if ((${#missing[@]} == 0)); then
    exit 0
fi
echo "installing for: ${missing[*]}"
sudo=()
((EUID == 0)) || sudo=(sudo)
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" apt-get install -y -qq --no-install-recommends \
    slurm-wlm munge openssh-server openssh-client pdsh iproute2 util-linux >/dev/null
