#!/usr/bin/env bash
# Makes .venv with the pinned versions of constraints.txt.
#   infra/install.sh          what `make run` needs
#   infra/install.sh dev      and what `make lint`, `make test` need
#   infra/install.sh bench    and what `make bench` needs
#
# torch comes first and alone: a later requirement would bring its default build, which on Linux
# holds several GB of CUDA libraries. Where no NVIDIA driver answers, the CPU build is taken: from
# the package sources that pip is set up with, or else from torch's own, which uv knows.
set -euo pipefail
cd "$(dirname "$0")/.."

extra="${1:-run}"
python="${PYTHON:-python3}"
torch="$(grep -E '^torch==' constraints.txt)"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "Peftflow needs Python 3.11 or newer; found $("$python" --version)." \
       "Name another with PYTHON=python3.12 make run" >&2
  exit 1
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" --quiet; }

# torch.__version__ ends in its build, as in 2.11.0+cpu.
if ! .venv/bin/python -c "import sys, torch; sys.exit('torch==' + torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    echo "Installing $torch with CUDA (an NVIDIA driver answers)"
    pip install "$torch"
  else
    echo "Installing $torch for the CPU (no NVIDIA driver answers)"
    if ! pip install "$torch+cpu" 2>/dev/null; then
      echo "pip's package sources have no CPU build; asking torch's own through uv"
      pip install --constraint constraints.txt uv
      .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend cpu "$torch"
    fi
  fi
fi

case "$extra" in
  run) target="." ;;
  dev) target=".[dev]" ;;
  bench) target=".[dev,bench]" ;;
  *) echo "unknown extra: $extra (run, dev or bench)" >&2; exit 2 ;;
esac
echo "Installing peftflow ($extra) and its pinned dependencies: two to four minutes the first time"
pip install --constraint constraints.txt --editable "$target"
touch ".venv/.installed-$extra"
