#!/usr/bin/env bash
# Checks what is promised of the diffusion U-Net, and prints a line for each: the figure, the goal, ok or short.
#
#   bash scripts/accept/diffusion.sh           all of it: about 100 minutes on two cores that do nothing else
#   bash scripts/accept/diffusion.sh 1 5       only these
#
# 1 parity with stock  2 scenes from scratch  3 keys and values only  4 speed  5 bad input
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

cd "$root"
install_mmattn dev
exec "$venv/bin/python" scripts/accept/diffusion.py "$@"
