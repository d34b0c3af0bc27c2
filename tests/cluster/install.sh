#!/usr/bin/env bash
# What the tests marked `cluster` need from the system: Slurm, munge, ssh, pdsh, network namespaces, nginx and its Lua,
# openssl, PostgreSQL; and Azurite and s3rver, servers that npm brings, in .venv/node. Debian or Ubuntu, as root.
set -euo pipefail

node=.venv/node
if [[ ! -x $node/node_modules/.bin/azurite-blob || ! -x $node/node_modules/.bin/s3rver ]]; then
    node_missing=1
fi
programs=(slurmctld slurmd munged sshd pdsh ip nsenter unshare nginx openssl)
packages=(slurm-wlm munge openssh-server openssh-client pdsh iproute2 util-linux nginx-light openssl)
if [[ ${node_missing:-} ]] && ! command -v npm >/dev/null; then
    programs+=(npm)
    packages+=(npm)
fi
missing=()
for program in "${programs[@]}"; do
    command -v "$program" >/dev/null || [[ -x /usr/sbin/$program ]] || missing+=("$program")
done
if ! compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && ! command -v initdb >/dev/null; then
    missing+=(initdb)
    packages+=(postgresql)
fi
if [[ ! -e /usr/lib/nginx/modules/ngx_http_lua_module.so ]]; then
    missing+=(ngx_http_lua_module)
    packages+=(libnginx-mod-http-lua)
fi
if ((${#missing[@]} > 0)); then
    echo "installing for: ${missing[*]}"
    sudo=()
    ((EUID == 0)) || sudo=(sudo)
    export DEBIAN_FRONTEND=noninteractive
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi
if [[ ${node_missing:-} ]]; then
    echo "installing azurite and s3rver into $node"
    # This version of Azurite has a third of the packages of later ones, which bring a client for telemetry.
    npm install --prefix "$node" --ignore-scripts --no-audit --no-fund --loglevel=error azurite@3.33.0 s3rver@3.7.1
fi
