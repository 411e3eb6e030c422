#!/usr/bin/env bash
# Makes ./.venv with everything `make demo` and `make test` need. Run again it does nothing, unless a pinned version changed.
# Debian or Ubuntu; root or sudo is used for apt packages when they are missing, else this says exactly what to install.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
extra=${1:-}  # more extras of pyproject.toml, for the target that needs them: `deploy/bootstrap.sh plots` or `plots,inference`
stamp=$venv/.kvfs-ready${extra:+-$extra}
key=$(cat pyproject.toml setup.py deploy/constraints.txt common/wire/*.proto | sha256sum | cut -d' ' -f1)
if [ -x $venv/bin/kvfs ] && [ "$(cat $stamp 2>/dev/null)" = "$key" ]; then exit 0; fi

say() { printf 'bootstrap: %s\n' "$*" >&2; }

python=${PYTHON:-python3}
need=()
command -v fusermount3 >/dev/null || need+=(fuse3)
command -v "$python" >/dev/null || need+=(python3)
if command -v "$python" >/dev/null; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need+=(python3-venv)
else
    need+=(python3-venv)
fi
if [ ${#need[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ]; then sudo=""; elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo=sudo; else
        say "these Debian packages are missing: ${need[*]}"
        say "install them as root, then run this again:  apt-get update && apt-get install -y ${need[*]}"
        exit 1
    fi
    say "installing Debian packages: ${need[*]}"
    export DEBIAN_FRONTEND=noninteractive
    $sudo apt-get update -qq >/dev/null || say "apt-get update failed; trying with the lists there are"
    $sudo apt-get install -y -qq "${need[@]}" >/dev/null
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "kvfs needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON to a newer one: make PYTHON=python3.12 ..."
    exit 1
}

say "installing kvfs into $venv (up to a minute the first time)"
[ -x $venv/bin/python ] || "$python" -m venv $venv
case ",$extra," in *,inference,*)
    # Before anything that depends on it, so that nothing chooses another build.
    $venv/bin/python -m pip --disable-pip-version-check install -q torch==2.13.0 2>&1 | { grep -v '^WARNING: Location' || true; }
esac
$venv/bin/python -m pip --disable-pip-version-check install -q -c deploy/constraints.txt -e ".[fuse,dev${extra:+,$extra}]" 2>&1 | { grep -v '^WARNING: Location' || true; }
[ -x $venv/bin/kvfs ] || { say "pip did not install the kvfs command: see its messages above"; exit 1; }
for done in $venv/.kvfs-ready $stamp; do printf '%s' "$key" > "$done"; done
