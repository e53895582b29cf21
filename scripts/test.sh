#!/usr/bin/env bash
# All checks from a fresh clone: makes .venv, then ruff, basedpyright, import-linter, pytest (arguments go to pytest).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

cd "$root"
install_mmattn dev
has_chromium=yes
install_chromium || has_chromium=no

# Tests use nothing from a hub. One thread a test process: the processes themselves fill the cores.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
bin="$venv/bin"
failed=()

check() {
    echo "== $*"
    "$bin/$@" </dev/null || failed+=("$1")
}

check ruff check .
check ruff format --check .
check basedpyright
check lint-imports
echo "== pytest"
workers="$("$bin/python" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')"
"$bin/python" -m pytest -n "$workers" --dist worksteal "$@" </dev/null || failed+=(pytest)
# Triton's interpreter is chosen for a whole process. (Where there is no Triton these tests say so and are skipped.)
if [ $# -eq 0 ]; then
    echo "== pytest, kernels on Triton's interpreter"
    TRITON_INTERPRET=1 "$bin/python" -m pytest -n "$workers" -m interpreter tests/kernels </dev/null ||
        failed+=("pytest, interpreter")
fi

if [ "$has_chromium" = no ]; then
    echo "NOT TESTED: the page of mmattn ui, for want of a Chromium that starts; install one, or run: .venv/bin/playwright install --with-deps chromium" >&2
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
