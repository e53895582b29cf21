"""The checks behind scripts/accept/swap.sh."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from lines import BIN, ROOT, RUNS, Checks, benchmark, main, report, run, tests

BACKEND = "_native_math"


def families() -> None:
    """1: every family stock, swapped and restored."""
    code, seconds, text = run([BIN / "python", "scripts/swap_table.py"], RUNS / "swap_table.log", HF_HUB_OFFLINE="1")
    found = re.search(r"(\d+) families, (\d+) bad", text)
    count, bad = found.groups() if found else ("0", "all")
    report(
        "1 families: difference within tolerance, restored exactly",
        f"{count} in {seconds:.0f} s",
        "30",
        int(count) >= 30,
    )
    report("1 families of which that does not hold", bad, "0", bad == "0")
    report("1 scripts/swap_table.py", f"exit code {code}", "0", code == 0)


def backends() -> None:
    """2: diffusers' own set_attention_backend, on a swapped U-Net; what restore leaves behind."""
    sys.path.insert(0, str(ROOT))
    from diffusers.models import attention_dispatch

    from mmattn import swap_attention
    from tests.swap.zoo import FAMILIES

    pipe, other = FAMILIES["sd1"].build(), FAMILIES["flux"].build()
    before = (process_state(attention_dispatch), model_state(pipe.unet), model_state(other))
    stock_output, other_output = FAMILIES["sd1"].run(pipe), FAMILIES["flux"].run(other)
    swapped = swap_attention(pipe)
    layers = [layer for layer in swapped.layers if layer.part == "unet"]
    pipe.unet.set_attention_backend(BACKEND)
    seen = followers(attention_dispatch, lambda: FAMILIES["sd1"].run(pipe), layers)
    followed = sum(count > 0 for count in seen.values())
    report(
        f"2 U-Net layers that follow set_attention_backend({BACKEND!r})",
        f"{followed}",
        f"{len(layers)}",
        followed == len(layers),
    )
    problems = swapped.restore()
    after = (process_state(attention_dispatch), model_state(pipe.unet), model_state(other))
    names = ("process default and registries", "the U-Net's processors, by identity", "another model's processors")
    for name, old, new in zip(names, before, after, strict=True):
        report(f"2 after restore(): {name}", "same" if old == new else "changed", "same", old == new)
    same = stock_output.equal(FAMILIES["sd1"].run(pipe)) and other_output.equal(FAMILIES["flux"].run(other))
    report("2 after restore(): both models' outputs", "equal" if same else "differ", "equal", same)
    report("2 layers that restore() could not put back", str(len(problems)), "0", not problems)


def process_state(dispatch: Any) -> tuple[Any, ...]:
    """diffusers' process-wide default, and what its registries hold."""
    registry, names = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName
    tables = (registry._backends, registry._constraints, registry._supported_arg_names)
    return registry._active_backend, tuple(names.__members__), *(tuple(sorted(map(str, table))) for table in tables)


def model_state(model: Any) -> list[tuple[str, int, Any]]:
    """Each module's processor, by identity, and its backend."""
    processors = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    return [(name, id(each), getattr(each, "_attention_backend", None)) for name, each in processors.items()]


def followers(dispatch: Any, action: Any, layers: list[Any]) -> dict[str, int]:
    """How often each layer's attention was computed by the backend within `action`."""
    registry, member = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName(BACKEND)
    served, counts, running = registry._backends[member], {layer.name: 0 for layer in layers}, []

    def counting(*arguments: Any, **keywords: Any) -> Any:
        counts[running[-1]] += 1
        return served(*arguments, **keywords)

    hooks = []
    for layer in layers:
        hooks.append(layer.module.register_forward_pre_hook(lambda *_, name=layer.name: running.append(name)))
        hooks.append(layer.module.register_forward_hook(lambda *_: running.pop() and None))
    registry._backends[member] = counting
    try:
        action()
    finally:
        registry._backends[member] = served
        for hook in hooks:
            hook.remove()
    return counts


def diffusers_tests() -> None:
    """3: diffusers' own tests, stock and swapped."""
    checkout = os.environ.get("DIFFUSERS_CHECKOUT")
    if not checkout:
        report("3 diffusers' own tests: no checkout given (DIFFUSERS_CHECKOUT)", "not run", "0 lost", False)
        return
    log = RUNS / "diffusers_tests.log"
    code, seconds, text = run(["bash", "scripts/diffusers_tests.sh", checkout], log)
    for name in ("stock", "swapped"):
        passed = re.search(rf"^{name}: (\d+) passed", text, re.MULTILINE)
        report(
            f"3 diffusers' own tests that pass, {name}", passed.group(1) if passed else "none", "printed", bool(passed)
        )
    lost = re.search(r"passed stock and not swapped: (\d+)", text)
    report(
        "3 passed stock and not swapped",
        lost.group(1) if lost else "none run",
        "0",
        bool(lost) and lost.group(1) == "0",
    )
    report("3 scripts/diffusers_tests.sh", f"{seconds / 60:.0f} min", "exit code 0", code == 0)


def speed() -> None:
    """4: beside stock, alternating."""
    for case in ("sd", "pixart", "gate"):
        benchmark(4, "scripts/bench/swap.py", f"swap_{case}", "--case", case)
    log = (RUNS / "swap_gate.log").read_text(encoding="utf-8")
    found = [line.strip() for line in log.splitlines() if "PSNR" in line]
    for line in found:
        print(f"  {line}", flush=True)
    report("4 PSNR over gate steps", f"{len(found)} lines", "printed", bool(found))


def bad_input() -> None:
    """5: clear errors, nothing half swapped."""
    tests(5, "bad input: clear errors, nothing half swapped", "tests/swap", "tests/cli/test_swap.py")


CHECKS: Checks = {"1": families, "2": backends, "3": diffusers_tests, "4": speed, "5": bad_input}

if __name__ == "__main__":
    sys.exit(main(CHECKS))
