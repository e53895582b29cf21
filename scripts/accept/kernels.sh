#!/usr/bin/env bash
# Checks what the Triton kernels promise, and prints a line for each: the figure, the goal, ok or short.
#
#   bash scripts/accept/kernels.sh           all of it: some minutes on two idle cores, and two on a card
#   bash scripts/accept/kernels.sh 1 2       only these
#
# 1 interpreter  2 ahead of time  3 tests on a card  4 speed on a card
#
# Where there is no CUDA card, 3 and 4 say so and count as short: nothing was checked there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

cd "$root"
install_mmattn dev
exec "$venv/bin/python" scripts/accept/kernels.py "$@"
