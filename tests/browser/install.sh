#!/usr/bin/env bash
# What the tests marked `browser` need from the system: Debian's chromium. Debian or Ubuntu, as root.
set -euo pipefail

if ! command -v chromium >/dev/null; then
    echo "installing chromium"
    sudo=()
    ((EUID == 0)) || sudo=(sudo)
    export DEBIAN_FRONTEND=noninteractive
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
fi
