#!/usr/bin/env bash
# Checks what the first release promises, and prints a line for each: the figure, the goal, ok or short.
#
#   bash scripts/accept/vlm.sh           all of it: about 90 minutes on two cores that do nothing else
#   bash scripts/accept/vlm.sh 2 4 8     only these
#
# 1 quickstart  2 scenes  3 stamps  4 BLIP  5 speed  6 kills  7 tests from a clone  8 bad input
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

cd "$root"
install_mmattn dev
exec "$venv/bin/python" scripts/accept/vlm.py "$@"
