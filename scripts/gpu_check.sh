#!/usr/bin/env bash
# Proves and measures mmattn on a CUDA card, in 15 minutes at most: the tests marked `gpu`, then each recipe by
# `accelerate launch` in bfloat16 (200 steps, killed and resumed; speed, MFU, memory), then tables of attention kernels
# (short keys, decoding, masked and packed rows, maps), of compiled and graphed models, and of translator, vision-language
# model and diffusion models beside stock; written to docs/gpu.md and docs/gpu.json. By the seconds of its parts, an H200
# does all of it in 13.
#
#   scripts/gpu_check.sh [--quick] [--output FILE] [--part PART]... [--seconds N] [--at-once N] [--keep FOLDER]
#                        [--join KEPT]...
#
# Of 80 GB fewer parts are prepared at a time than of 140, and the last may not be reached. Then, or where no run may
# take so long: in two runs, of parts named, each kept in a folder of its own; then the page of both, which needs no
# card. What both lack is taken from the page as it is, and which part comes from which run is said. (Starting takes up
# to half a minute more than --seconds, and ending 5 s.)
#
#   scripts/gpu_check.sh --part tests --part training_compiled --part attention --part translator --part diffusion \
#                        --seconds 560 --keep one
#   scripts/gpu_check.sh --part short_keys --part decode --part varlen --part maps --seconds 200 --keep two
#   scripts/gpu_check.sh --join one --join two --join docs/gpu.json
#
# Run only where they are named: `--part experiments`, kernels that are not in the package (docs/kernels.md); `--part
# profile` and `--part profile_changes`, where a training step's time goes, and with single changes.
#
# It makes .venv as scripts/test.sh does. With MMATTN_PYTHON=/path/to/python it uses that Python and installs nothing.
# Imports, compilation and models of several parts are prepared side by side (--at-once); one measures at a time, while all
# others are stopped.
#
# Exit status: 0 all well, 1 something failed or ran out of time (the rest was still run), 2 no CUDA card here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

python="${MMATTN_PYTHON:-}"
if [ -z "$python" ]; then
    case " $* " in
    *" --device cpu "* | *" --join "* | *" --help "* | *" -h "*) ;;
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
