#!/usr/bin/env bash
# Proves and measures mmattn on a CUDA card, in under 10 minutes on an H100 or H200: first each recipe by `accelerate
# launch` in bfloat16 (200 steps, killed and resumed; speed, MFU, memory), then the tests marked `gpu`, then tables of
# attention kernels, translator, vision-language model and diffusion models beside stock, written to docs/gpu.md.
#
#   scripts/gpu_check.sh [--quick] [--output FILE] [--logs FOLDER] [--part PART]
#
# It makes .venv as scripts/test.sh does. With MMATTN_PYTHON=/path/to/python it uses that Python and installs nothing.
# Exit status: 0 all well, 1 something failed (the rest was still run), 2 no CUDA card here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

python="${MMATTN_PYTHON:-}"
if [ -z "$python" ]; then
    case " $* " in
    *" --device cpu "* | *" --help "* | *" -h "*) ;;
    *)
        if ! has_nvidia_gpu; then
            echo "gpu_check.sh: no CUDA card here (nvidia-smi lists none): nothing was checked"
            exit 2
        fi
        ;;
    esac
    install_mmattn dev
    python="$venv/bin/python"
elif ! "$python" -c 'import torch' 2>/dev/null; then
    fail "MMATTN_PYTHON=$python cannot import torch (or is not there)"
fi
case "$python" in */*) python="$(cd "$(dirname "$python")" && pwd)/$(basename "$python")" ;; esac
cd "$root"
exec "$python" scripts/gpu/run.py "$@"
