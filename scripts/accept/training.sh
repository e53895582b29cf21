#!/usr/bin/env bash
# Checks what is promised of training, and prints a line for each: the figure, the goal, ok or short.
#
#   bash scripts/accept/training.sh           all of it: about 2 hours on two cores that do nothing else
#   bash scripts/accept/training.sh 1 5       only these
#
# 1 exact and unbreakable, 100 kills  2 DDP and FSDP2  3 speed  4 streaming  5 four ways to launch  6 a GPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

cd "$root"
install_mmattn dev
exec "$venv/bin/python" scripts/accept/training.py "$@"
