#!/usr/bin/env bash
# Does an aarch64 device compute what was exported? arm64.sh FOLDER puts Debian's aarch64 Python and the aarch64 wheels
# of the edge's closure into FOLDER/arm64 and runs psgl-edge verify with them under qemu-user, on one bundle each of
# profiles paper and hardened. Nothing of the host is changed. PYTHON: a Python with psgl[export].
set -euo pipefail
. "$(dirname "$0")/functions.sh"

[ $# = 1 ] || fail "usage: arm64.sh FOLDER"
need_root
need debootstrap "apt install debootstrap"
need dpkg-deb "apt install dpkg"
need qemu-aarch64 "apt install qemu-user"
PYTHONPATH=$CHECKOUT "$PYTHON" -c "import export.build" >/dev/null 2>&1 || fail "$PYTHON lacks psgl[export]: name one that has it, PYTHON=..."
alone "$@"
chosen_folder "$1"
ROOT=$OUT/arm64/root

# The first stage downloads and unpacks what is required; the rest is unpacked here, and nothing is configured: that
# would run aarch64 programs by the hundred.
bootstrap "$ROOT" --foreign --arch=arm64
for package in "$ROOT"/var/cache/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x --skip-old-files --keep-directory-symlink -C "$ROOT"
done
rm -rf "$ROOT"/var/cache/apt "$ROOT"/var/lib/apt/lists "$ROOT/debootstrap"
install_sdk "$ROOT" aarch64
echo "aarch64 root with the SDK: $(du -s --apparent-size --block-size=MB "$ROOT" | cut -f 1)"

# onnxruntime asks /proc/cpuinfo for the processor's features and aborts over that of another architecture.
rm -f "$ROOT/proc"
mkdir -p "$ROOT/proc"
cp "$HERE/cpuinfo" "$ROOT/proc/cpuinfo"

export PYTHONPATH=$CHECKOUT OMP_NUM_THREADS=1
"$PYTHON" "$HERE/image_bundles.py" "$OUT/arm64/bundles" paper hardened >/dev/null
"$PYTHON" "$HERE/image_verify.py" "$ROOT" "$OUT/arm64/bundles/paper.psgl" "$OUT/arm64/bundles/hardened.psgl" \
    --json "$OUT/arm64/verify.json"
rm -rf "$OUT/tmp"
