#!/usr/bin/env bash
# Build the site: bash launch/docs.sh [options of sphinx-build]; the pages are in site/index.html.
# Warnings are errors. With the packages of the extra docs installed, nothing is loaded from the network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

install_fmjax "docs${FMJAX_EXTRAS:+,$FMJAX_EXTRAS}"
cd "$root"
exec env JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" "$python" -m sphinx --fail-on-warning --keep-going --quiet "$@" docs site
