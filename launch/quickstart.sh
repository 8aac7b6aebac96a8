#!/usr/bin/env bash
# From a fresh clone to samples and a report: bash launch/quickstart.sh [WORKDIR] [--config.field=value ...]
# Makes .venv, installs fmjax (FMJAX_EXTRAS=cuda or tpu for an accelerator) and runs the pipeline on handwritten digits;
# no data are downloaded. WORKDIR defaults to workdir/digits in the repository. A second run resumes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

workdir=$root/workdir/digits
case ${1:-} in
-h | --help) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" && exit ;;
--*) ;;
?*) workdir=$1 && shift ;;
"") [ $# -eq 0 ] || shift ;;
esac
case $workdir in
/* | *://*) ;;
*) workdir=$PWD/$workdir ;;
esac

install_fmjax "${FMJAX_EXTRAS:-}"
cd "$root"
exec "$python" -m launch.pipeline --config=configs/digits.py --workdir="$workdir" "$@"
