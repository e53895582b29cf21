#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment in a temporary folder, and trains the debug recipe from there.
# Needs the .venv of scripts/test.sh for building. Prints one line when all is well, the whole log otherwise.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

try_wheel() {
    set -e
    export HF_HUB_OFFLINE=1
    set_pip_options
    "$venv/bin/python" -m build --wheel --outdir "$work/dist" "$root"
    "$venv/bin/python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install "${options[@]}" "$work"/dist/*.whl
    cd "$work"
    env -u PYTHONPATH "$work/venv/bin/mmattn" ls
    env -u PYTHONPATH "$work/venv/bin/mmattn" train vlm/debug
}

# A subshell of its own, so that `set -e` holds inside it.
set +e
(try_wheel) >"$work/log" 2>&1 </dev/null
status=$?
set -e
if [ "$status" -ne 0 ]; then
    cat "$work/log"
    echo "wheel: FAILED (exit $status)" >&2
    exit 1
fi
echo "wheel: $(basename "$work"/dist/*.whl) installed into an empty environment; $(tail -n 1 "$work/log")"
