#!/usr/bin/env bash
# Checks what the translator promises, and prints a line for each: the figure, the goal, ok or short.
#
#   bash scripts/accept/translate.sh             all of it: over an hour on two idle cores
#   bash scripts/accept/translate.sh 2 5 6       only these
#
# 1 speed  2 memory  3 scenes and office help, trained  4 fewer key/value heads  5 parity and round trips  6 bad input
#
# 3 fetches Debian packages of LibreOffice's help with apt-get, or takes them unpacked from $OFFICE_HELP.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"

cd "$root"
install_mmattn dev
exec "$venv/bin/python" scripts/accept/translate.py "$@"
