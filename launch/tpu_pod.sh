#!/usr/bin/env bash
# Train on every host of a Cloud TPU VM or pod slice:
#   bash launch/tpu_pod.sh TPU_NAME ZONE CONFIG gs://BUCKET/WORKDIR [--config.field=value ...]
# Copies the committed tree (HEAD) to all hosts, installs fmjax[tpu] there and starts launch.train on each;
# jax.distributed finds the other hosts in the TPU's metadata. Needs gcloud, and a WORKDIR that all hosts can write.
# Run it again to resume.
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '3s/^# */usage: /p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
name=$1 zone=$2 config=$3 workdir=$4
shift 4
case $workdir in
gs://*) ;;
*) echo "WORKDIR is $workdir; give gs://BUCKET/PATH: every host writes its part of a checkpoint there" >&2 && exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tree=$(mktemp)
trap 'rm -f "$tree"' EXIT
git archive --format=tar.gz --output="$tree" HEAD
gcloud compute tpus tpu-vm scp "$tree" "$name:fmjax.tar.gz" --zone="$zone" --worker=all

flags=$(printf ' %q' --config="$config" --workdir="$workdir" "$@")
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
set -eu
mkdir -p fmjax && tar -xzf fmjax.tar.gz -C fmjax && cd fmjax
bash -c 'set -eu; source launch/env.sh; install_fmjax tpu'
FMJAX_DISTRIBUTED=1 .venv/bin/python -m launch.train$flags"
