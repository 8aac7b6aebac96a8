#!/usr/bin/env bash
# Lint, tests, examples in docstrings: bash launch/test.sh [pytest arguments]; paths are relative to the repository.
# Without arguments the wheel is built and tried, too, and the site where the packages of the extra docs can be installed.
# FMJAX_TEST_WORKERS: pytest processes, 2 by default, each with 8 virtual CPU devices; 0 runs in this process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_fmjax "test${FMJAX_EXTRAS:+,$FMJAX_EXTRAS}"
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m launch.language
"$python" -m pytest -n "${FMJAX_TEST_WORKERS:-2}" --dist worksteal "$@"
[ $# -eq 0 ] || exit 0
bash launch/package.sh
if ! (install_fmjax docs); then
    echo "the site is not built: the packages of the extra docs cannot be installed here" >&2
    exit 0
fi
exec bash launch/docs.sh
