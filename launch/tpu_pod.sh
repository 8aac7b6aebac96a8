#!/usr/bin/env bash
# Train on every host of a Cloud TPU VM or pod slice:
#   bash launch/tpu_pod.sh TPU_NAME ZONE CONFIG WORKDIR [--config.field=value ...]
# Copies the committed tree (HEAD) to all hosts, installs fmjax[tpu] there and starts launch.train on each;
# jax.distributed finds the other hosts in the TPU's metadata. WORKDIR is gs://BUCKET/PATH, which the hosts mount with
# gcsfuse, or a folder of a file system that all hosts share (Filestore). Needs gcloud. Run it again to resume.
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '3s/^# */usage: /p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
name=$1 zone=$2 config=$3 workdir=$4
shift 4
mount=true
case $workdir in
gs://?*/?*) bucket=${workdir#gs://} && bucket=${bucket%%/*} && workdir=/mnt/fmjax/${workdir#gs://"$bucket"/}
    mount="mountpoint -q /mnt/fmjax || { sudo mkdir -p /mnt/fmjax && sudo chown \$USER /mnt/fmjax && gcsfuse --implicit-dirs $bucket /mnt/fmjax; }" ;;
/*) ;;
*) echo "WORKDIR=$workdir: every host writes there. Give gs://BUCKET/PATH or a folder of a shared file system." >&2 && exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tree=$(mktemp)
trap 'rm -f "$tree"' EXIT
git archive --format=tar.gz --output="$tree" HEAD
gcloud compute tpus tpu-vm scp "$tree" "$name:fmjax.tar.gz" --zone="$zone" --worker=all

flags=$(printf ' %q' --config="$config" --workdir="$workdir" "$@")
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
set -eu
$mount
mkdir -p fmjax && tar -xzf fmjax.tar.gz -C fmjax && cd fmjax
bash -c 'set -eu; source launch/env.sh; install_fmjax tpu'
FMJAX_DISTRIBUTED=1 .venv/bin/python -m launch.train$flags"
