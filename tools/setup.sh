#!/usr/bin/env bash
# Makes a bare clone ready: a virtual environment with the locked dependencies, and the Debian
# packages that the tests need. Safe to run again and again; quick when nothing changed.
#
#   tools/setup.sh            both
#   tools/setup.sh python     the virtual environment only
#   GRAFOS_SKIP_APT=1         never touches Debian packages, only names those that are missing
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/.grafos-setup

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Two targets started side by side must not build one environment at the same time.
if command -v flock >/dev/null; then
    exec 9>.setup.lock
    flock 9
fi

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.11 python3.12 python3.13 python3.14; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "needs Python 3.11 or newer; found $(python3 --version 2>&1 || echo none)." \
        "Install it, or name it: make setup PYTHON=/path/to/python3.11"
}

# --- Debian packages -------------------------------------------------------------------------

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

may_install() {
    [ -z "${GRAFOS_SKIP_APT:-}" ] && command -v apt-get >/dev/null \
        && { [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null; }
}

# What is installed here is for tests that start it themselves; Debian would start etcd and Redis
# as services, so a policy that denies this stands while apt-get runs, unless one is there already.
POLICY=/usr/sbin/policy-rc.d
policy_is_ours=

deny_service_starts() {
    [ -e "$POLICY" ] && return
    policy_is_ours=1
    trap allow_service_starts EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$POLICY" >/dev/null
    as_root chmod 755 "$POLICY"
}

allow_service_starts() {
    [ -z "$policy_is_ours" ] || as_root rm -f "$POLICY"
    policy_is_ours=
}

apt_install() {
    local log
    log=$(mktemp)
    say "installing the Debian packages: $*"
    deny_service_starts
    if as_root apt-get -o DPkg::Lock::Timeout=300 update >"$log" 2>&1 \
        && as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
            install -y --no-install-recommends "$@" >>"$log" 2>&1; then
        allow_service_starts
        rm -f "$log"
        return 0
    fi
    allow_service_starts
    tail -n 5 "$log" >&2
    rm -f "$log"
    return 1
}

has_command() {
    command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]
}

debian_packages() {
    local missing=() pair
    for pair in strace:strace ip:iproute2 nft:nftables etcd:etcd-server redis-server:redis-server; do
        has_command "${pair%%:*}" || missing+=("${pair##*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if may_install && apt_install "${missing[@]}"; then
        return 0
    fi
    say "these Debian packages are missing: ${missing[*]}"
    say "the tests that need them are skipped by name; to have them run:" \
        "sudo apt-get install ${missing[*]}"
}

# --- Python ----------------------------------------------------------------------------------

locked_version() {
    sed -n "/^name = \"$1\"\$/{n;s/^version = \"\(.*\)\"\$/\1/p;q}" uv.lock
}

fingerprint() {
    { "$1" --version; pwd; cat pyproject.toml uv.lock tools/setup.sh; } | sha256sum | cut -d' ' -f1
}

make_venv() {
    local python=$1
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        may_install && apt_install python3-venv \
            || die "$python has no venv module; on Debian: sudo apt-get install python3-venv"
    fi
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
}

python_environment() {
    local python want uv_version
    python=$(find_python)
    want=$(fingerprint "$python")
    [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$want" ] && return
    if ! "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        make_venv "$python"
    fi
    uv_version=$(locked_version uv)
    if [ "$("$VENV/bin/uv" --version 2>/dev/null | cut -d' ' -f2)" != "$uv_version" ]; then
        say "fetching uv $uv_version"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
    fi
    say "installing the locked dependencies"
    export UV_PROJECT_ENVIRONMENT=$VENV UV_PYTHON=$VENV/bin/python UV_PYTHON_DOWNLOADS=never \
        UV_LINK_MODE=copy
    # In two steps, so that hatchling, which builds the second, is the locked one too.
    "$VENV/bin/uv" sync --frozen --quiet --inexact --no-install-project
    "$VENV/bin/uv" sync --frozen --quiet --inexact --no-build-isolation
    printf '%s\n' "$want" >"$STAMP"
    say "$VENV is ready"
}

python_environment
[ "${1:-all}" = python ] || debian_packages
