#!/usr/bin/env bash
# Build sdist and wheel into dist/, install them in an environment of their own, use the command: bash launch/package.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$(find_python)" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install hatchling
cd "$root"
rm -rf dist
"$work/venv/bin/python" -m hatchling build -d dist
pip wheel --no-deps --wheel-dir "$work/again" dist/fmjax-*.tar.gz
files() { "$work/venv/bin/python" -m zipfile -l "$1" | awk '{print $1, $NF}'; }  # names and sizes
diff <(files dist/fmjax-*.whl) <(files "$work"/again/fmjax-*.whl)
pip install -c constraints.txt dist/fmjax-*.whl
mkdir "$work/empty"
cd "$work/empty"
"$work/venv/bin/fmjax" --help >/dev/null
JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} "$work/venv/bin/fmjax" train --config=digits --workdir=W --config.steps=20
JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} "$work/venv/bin/fmjax" sample --workdir=W --count=4 --out=grid.png
test -s grid.png
echo "built and tried: $(cd "$root" && echo dist/*)"
