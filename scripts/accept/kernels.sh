#!/usr/bin/env bash
# Checks what the Triton kernels promise, and prints a line for each: the figure, the goal, ok or short.
#
#   bash scripts/accept/kernels.sh           all of it: some minutes on two idle cores, and 15 on a card
#   bash scripts/accept/kernels.sh 1 2       only these
#
# 1 interpreter  2 ahead of time  3 everything on a card, in a page  4 speed on a card  5 the page about the kernels
#
# Where there is no CUDA card, 3 and 4 read what was measured on one and committed (docs/gpu.json): each figure then says
# when, and on which card. What is not in there counts as short.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

cd "$root"
install_mmattn dev
exec "$venv/bin/python" scripts/accept/kernels.py "$@"
