#!/usr/bin/env bash
# Lint, format, types and tests. --slow adds the tests marked slow, --deepspeed installs that extra and runs its tests
# alone; other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup test
marks="not slow and not deepspeed"
case "${1:-}" in
  --slow) marks="not deepspeed"; shift ;;
  --deepspeed) marks="deepspeed"; # which looks for torch when it is built
    .venv/bin/pip install --quiet setuptools wheel
    DS_BUILD_OPS=0 .venv/bin/pip install --quiet --no-build-isolation 'deepspeed>=0.19'
    shift ;;
esac
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two processes for two cores; a file stays in one of them, so that its fixtures are built once.
.venv/bin/pytest -n 2 --dist loadfile -m "$marks" "$@"
