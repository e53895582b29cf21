#!/usr/bin/env bash
# Checks what is promised of seeing and steering attention, and prints a line for each: the figure, the goal, ok or
# short.
#
#   bash scripts/accept/maps.sh           all of it; 3 and 4 need the runs that diffusion.sh, vlm.sh, translate.sh leave
#   bash scripts/accept/maps.sh 2 4       only these
#
# 1 cost of recording  2 maps are right  3 maps find the truth  4 steering  5 the page  6 bad input
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

cd "$root"
install_mmattn dev
exec "$venv/bin/python" scripts/accept/maps.py "$@"
