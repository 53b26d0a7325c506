#!/usr/bin/env bash
# A root file system for a gateway: Debian, Python and the edge SDK alone. build.sh FOLDER makes FOLDER/root and
# FOLDER/sizes.json and writes nowhere else. PYTHON: a Python with pip; MIRROR: of Debian's packages.
set -euo pipefail
. "$(dirname "$0")/functions.sh"

[ $# = 1 ] || fail "usage: build.sh FOLDER"
need_root
need debootstrap "apt install debootstrap"
"$PYTHON" -m pip --version >/dev/null 2>&1 || fail "$PYTHON has no pip: apt install python3-pip, or PYTHON=..."
alone "$@"
chosen_folder "$1"
ROOT=$OUT/root

bootstrap "$ROOT"
install_sdk "$ROOT" "$(uname -m)"

useradd --root "$ROOT" --system --user-group --home-dir /var/lib/psgl --shell /usr/sbin/nologin psgl
install -d -m 755 "$ROOT/usr/lib/psgl" "$ROOT/etc/systemd/system"
install -d -m 700 -o "$(chroot "$ROOT" id -u psgl)" -g "$(chroot "$ROOT" id -g psgl)" "$ROOT/etc/psgl" "$ROOT/var/lib/psgl"
install -m 644 "$HERE/../gateway/psgl-edge.service" "$ROOT/etc/systemd/system/"
install -m 600 -o "$(chroot "$ROOT" id -u psgl)" -g "$(chroot "$ROOT" id -g psgl)" "$HERE/../gateway/device.toml" "$ROOT/etc/psgl/"

# Caches, and documents that a device has no reader for; licences stay.
rm -rf "$ROOT"/var/cache/{apt,debconf,ldconfig} "$ROOT"/var/lib/apt/lists "$ROOT"/var/log/* "$ROOT"/usr/share/{man,info,locale,lintian}
mkdir -p "$ROOT/var/cache/apt/archives/partial" "$ROOT/var/lib/apt/lists/partial"
find "$ROOT/usr/share/doc" -type f ! -name copyright -delete
find "$ROOT" -xdev -type d -name __pycache__ -prune -exec rm -rf {} +
rm -rf "$OUT/tmp"

"$PYTHON" "$HERE/image_sizes.py" "$ROOT" --json "$OUT/sizes.json"
