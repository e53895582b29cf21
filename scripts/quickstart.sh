#!/usr/bin/env bash
# From a fresh clone to a trained model: makes .venv, installs mmattn, runs `mmattn demo`.
# Arguments go to the demo (see `mmattn demo --help`).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

cd "$root"
install_mmattn recipes,plot
exec "$venv/bin/mmattn" demo "$@"
