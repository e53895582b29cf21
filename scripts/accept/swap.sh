#!/usr/bin/env bash
# Checks what swap_attention promises, and prints a line for each: the figure, the goal, ok or short.
#
#   DIFFUSERS_CHECKOUT=~/diffusers bash scripts/accept/swap.sh       all of it: about 40 minutes on two idle cores
#   bash scripts/accept/swap.sh 1 2 5                                only these
#
# 1 families  2 set_attention_backend  3 diffusers' own tests  4 speed  5 bad input
#
# DIFFUSERS_CHECKOUT is a clone of diffusers, best at the tag of the installed version; only check 3 needs it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

cd "$root"
install_mmattn dev
exec "$venv/bin/python" scripts/accept/swap.py "$@"
