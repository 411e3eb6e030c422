#!/usr/bin/env bash
# Makes ./.venv-ecosystem: kvfs beside the engines it is connected to, without a GPU, for `make test-ecosystem`. About 4 GB. Run again it does nothing,
# unless a pinned version changed.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-ecosystem
stamp=$venv/.kvfs-ready
key=$(cat pyproject.toml setup.py deploy/ecosystem.sh deploy/ecosystem-constraints.txt common/wire/*.proto | sha256sum | cut -d' ' -f1)
if [ "$(cat $stamp 2>/dev/null)" = "$key" ]; then exit 0; fi

# The engines' own requirements exclude each other (three versions of torch) and bring CUDA along: what their storage code imports is in the
# extra `ecosystem`, and they themselves come without requirements. torchvision must fit torch.
engines=(sglang==0.5.23 lmcache==0.5.6 vllm==0.33.0 torchvision==0.28.0)

python=${PYTHON:-python3}
[ -x $venv/bin/python ] || "$python" -m venv $venv
install() { $venv/bin/python -m pip --disable-pip-version-check install -q "$@" 2>&1 | { grep -v -e '^WARNING: Location' -e ' requires ' -e 'dependency resolver' || true; }; }
printf 'ecosystem: installing into %s (some minutes the first time)\n' $venv >&2
install torch==2.13.0
install -c deploy/ecosystem-constraints.txt -e '.[dev,ecosystem]'
install --no-deps "${engines[@]}"
$venv/bin/python - <<'CHECK'
from importlib.metadata import version
for name in ("kvfs", "torch", "sglang", "lmcache", "vllm", "pytest"):
    version(name)  # says which one pip did not install
CHECK
printf '%s' "$key" > $stamp
