#!/usr/bin/env bash
# Lint, format, types and tests. --slow adds the tests marked slow; other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup test
marks="not slow"
if [ "${1:-}" = "--slow" ]; then marks="slow or not slow"; shift; fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two processes for two cores; a file stays in one of them, so that its fixtures are built once.
.venv/bin/pytest -n 2 --dist loadfile -m "$marks" "$@"
