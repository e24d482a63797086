#!/usr/bin/env bash
# tools/system.sh [PROGRAM...]: installs Debian packages that we use if they are there: those of these programs, or all.
# Never fails: without root, apt or a network it says in a line what will be skipped. NO_APT=1 says so at once.
set -uo pipefail
declare -A packages=(
    [fio]="fio" [zstd]="zstd" [radosgw]="radosgw ceph-mon ceph-osd ceph-mgr ceph-common"
    [redis-server]="redis-server" [cc]="gcc libc6-dev"
)
declare -A uses=(
    [fio]="the peer of bench.ssd" [zstd]="the traces arc_OLTP and arc_P3" [radosgw]="Ceph as origin (--s3 ceph)"
    [redis-server]="a peer of bench.local" [cc]="the native copy kernel (without it verified copies take twice as long)"
)
missing=()
[[ $# -gt 0 ]] || set -- "${!packages[@]}"
for program in "$@"; do
    command -v "$program" >/dev/null || missing+=("$program")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

reason=""
if [[ -n ${NO_APT:-} ]]; then
    reason="NO_APT is set"
elif [[ $(id -u) -ne 0 ]]; then
    reason="not root"
elif ! command -v apt-get >/dev/null; then
    reason="no apt-get here"
else
    export DEBIAN_FRONTEND=noninteractive
    options=(-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=120)
    names=()
    for program in "${missing[@]}"; do
        read -ra more <<<"${packages[$program]}"
        names+=("${more[@]}")
    done
    echo "Installing Debian packages: ${names[*]}"
    timeout 120 apt-get "${options[@]}" update >/dev/null 2>&1
    if ! log=$(timeout 600 apt-get "${options[@]}" install -y --no-install-recommends "${names[@]}" 2>&1); then
        reason="apt-get failed: $(tail -n 1 <<<"$log")"
    fi
fi
for program in "${missing[@]}"; do
    command -v "$program" >/dev/null || echo "Skipped without $program: ${uses[$program]} (${reason:-not in the package})"
done
exit 0
