#!/usr/bin/env bash
# Runs diffusers' own tests against the installed diffusers, stock and with our attention in every model that they build
# (scripts/diffusers_plugin.py), and compares which of them pass. Exit code 1 when one that passed stock does not.
#
#   bash scripts/diffusers_tests.sh CHECKOUT     about 10 minutes on two cores; more arguments go to pytest
#
# CHECKOUT is a clone of diffusers, best at the tag of the installed version: its tests are in no wheel. Attention
# processors, 2-D condition U-Net, IP-Adapters of Stable Diffusion 1 and XL, LoRA of both. Nothing is written into it,
# and nothing asked of the hub. Logs and outcomes: runs/diffusers_tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

[ $# -gt 0 ] || fail "give the folder of a diffusers checkout: bash scripts/diffusers_tests.sh CHECKOUT"
checkout="$(cd "$1" 2>/dev/null && pwd)" || fail "$1: no such folder"
shift
[ -f "$checkout/tests/models/test_attention_processor.py" ] || fail "$checkout: no checkout of diffusers (no tests in it)"

cd "$root"
install_mmattn dev
work="$root/runs/diffusers_tests" python="$venv/bin/python"
mkdir -p "$work"
# Two small packages that its tests import; kept out of .venv.
[ -d "$work/packages/requests_mock" ] ||
    "$python" -m pip install --quiet --no-deps --target "$work/packages" parameterized requests-mock

paths=()
for path in models/test_attention_processor.py models/unets/test_models_unet_2d_condition.py \
    pipelines/ip_adapters pipelines/stable_diffusion pipelines/stable_diffusion_xl \
    lora/test_lora_layers_sd.py lora/test_lora_layers_sdxl.py; do
    if [ -e "$checkout/tests/$path" ]; then paths+=("tests/$path"); else echo "not in this checkout: tests/$path"; fi
done

echo "tests of diffusers $(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$checkout/src/diffusers/__init__.py"), installed" \
    "$("$python" -c 'import importlib.metadata as m; print(m.version("diffusers"))')"

run_tests() (
    cd "$checkout"
    rm -f "$work/$1.json"
    ATTENTION="$1" OUTCOMES="$work/$1.json" PYTHONPATH="$root/scripts:$work/packages" PYTHONDONTWRITEBYTECODE=1 \
        HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
        "$python" -m pytest -p diffusers_plugin -p no:cacheprovider -q -W ignore --tb=short "${paths[@]}" "${@:2}" \
        </dev/null >"$work/$1.log" 2>&1 || true
    [ -f "$work/$1.json" ] || fail "the run did not end; see $work/$1.log"
)

run_tests stock "$@" &
stock=$!
run_tests swapped "$@"
wait "$stock"
exec "$python" scripts/diffusers_plugin.py "$work/stock.json" "$work/swapped.json"
