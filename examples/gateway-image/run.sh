#!/usr/bin/env bash
# Train inside the image: run.sh FOLDER runs psgl-edge in FOLDER/root (build.sh makes it) as user psgl, with a broker
# and psgl-server on this machine, and writes into FOLDER/run alone. PYTHON: a Python with psgl[export].
set -euo pipefail
. "$(dirname "$0")/functions.sh"

[ $# = 1 ] || fail "usage: run.sh FOLDER"
need_root
[ -x "$1/root/usr/local/bin/psgl-edge" ] || fail "there is no image in $1: build.sh $1"
PYTHONPATH=$CHECKOUT "$PYTHON" -c "import export.build" >/dev/null 2>&1 || fail "$PYTHON lacks psgl[export]: name one that has it, PYTHON=..."
alone "$@"
chosen_folder "$1"

rm -rf --one-file-system "$OUT/run"
mkdir -p "$OUT/run/device"
chown "$(chroot "$OUT/root" id -u psgl)" "$OUT/run/device"
mount -t proc proc "$OUT/root/proc"
mount --bind "$OUT/run/device" "$OUT/root/mnt"
cd "$OUT/run"
export PYTHONPATH=$CHECKOUT OMP_NUM_THREADS=1
"$PYTHON" "$HERE/image_run.py" "$OUT/root" "$OUT/run"
rm -rf "$OUT/tmp"
