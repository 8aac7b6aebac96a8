#!/usr/bin/env bash
# Lint, tests, examples in docstrings: bash launch/test.sh [pytest arguments]; paths are relative to the repository.
# FMJAX_TEST_WORKERS: pytest processes, 2 by default, each with 8 virtual CPU devices; 0 runs in this process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_fmjax "test${FMJAX_EXTRAS:+,$FMJAX_EXTRAS}"
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m launch.language
exec "$python" -m pytest -n "${FMJAX_TEST_WORKERS:-2}" --dist worksteal "$@"
