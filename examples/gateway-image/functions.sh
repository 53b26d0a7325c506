# Shared by build.sh, run.sh and arm64.sh, which source it.
SUITE=bookworm # its Python is 3.11, its glibc 2.36
PYTHON=${PYTHON:-python3}
# onnxruntime's wheels gather events about their use in ~/.cache and send them to its makers, unless this is set before
# it is imported.
export ORT_DISABLE_TELEMETRY=1
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(cd "$HERE/../.." && pwd)

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# need PROGRAM REMEDY
need() {
    command -v "$1" >/dev/null || fail "$1 is missing: $2"
}

need_root() {
    [ "$(id -u)" = 0 ] || fail "a root file system is made and entered by root alone: run it with sudo"
}

# Start over in name spaces of its own for mounts and processes: both are gone with this process, however it ends.
alone() {
    local code=0
    if [ -n "${GATEWAY_IMAGE_ALONE:-}" ]; then
        return
    fi
    need unshare "apt install util-linux"
    need setpriv "apt install util-linux"
    GATEWAY_IMAGE_ALONE=1 setpriv --pdeathsig KILL \
        unshare --mount --pid --fork --mount-proc --kill-child=KILL -- "$0" "$@" &
    trap "kill -KILL $!; exit 143" INT TERM HUP
    wait "$!" || code=$?
    exit "$code"
}

# chosen_folder FOLDER: its absolute path in OUT; everything that is written stays there.
chosen_folder() {
    mkdir -p "$1/tmp"
    OUT=$(cd "$1" && pwd)
    [ "$OUT" != / ] || fail "/ is no folder to build in: name a new one"
    export TMPDIR=$OUT/tmp PIP_CACHE_DIR=$OUT/pip-cache PYTHONDONTWRITEBYTECODE=1
    umask 022
}

# bootstrap ROOT [OPTION...]: Debian's packages, by debootstrap.
bootstrap() {
    local root=$1
    shift
    rm -rf --one-file-system "$root"
    mkdir -p "$root"
    debootstrap "$@" --variant=minbase --include=python3,ca-certificates "$SUITE" "$root" ${MIRROR:+"$MIRROR"} \
        >"$OUT/debootstrap.log" 2>&1 || fail "debootstrap failed, its last line: $(tail -n 1 "$OUT/debootstrap.log")"
}

# install_sdk ROOT MACHINE: this checkout's wheel with its base dependencies, versions of constraints.txt, no sources built.
install_sdk() {
    local source=$OUT/source site=$1/usr/local/lib/python3.11/dist-packages platforms=() minor
    rm -rf "$source" "$OUT/wheel"
    mkdir -p "$source" "$site" "$1/usr/local/bin"
    (cd "$CHECKOUT" && tar -c --exclude=__pycache__ edge_sdk server_sdk export pyproject.toml README.md LICENSE) |
        tar -x -C "$source"
    "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$OUT/wheel" "$source" ||
        fail "the wheel could not be built: pip's message is above"
    for minor in $(seq 17 36); do
        platforms+=(--platform "manylinux_2_${minor}_$2")
    done
    "$PYTHON" -m pip install --quiet --no-compile --root-user-action=ignore --target "$site" --upgrade \
        --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none "${platforms[@]}" \
        --platform "manylinux2014_$2" --platform any --only-binary=:all: \
        -c "$CHECKOUT/constraints.txt" "$OUT"/wheel/*.whl || fail "the SDK could not be installed: pip's message is above"
    rm -rf "$site/bin" # their first line names this machine's Python
    cat >"$1/usr/local/bin/psgl-edge" <<'SCRIPT'
#!/usr/bin/python3
import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # a device reports to its operator alone; read when onnxruntime is imported
from edge_sdk.cli import main

sys.exit(main())
SCRIPT
    chmod 755 "$1/usr/local/bin/psgl-edge"
    rm -rf "$source" "$OUT/wheel" "$OUT/pip-cache"
}
