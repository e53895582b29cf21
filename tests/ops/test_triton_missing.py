"""Which cards our own Triton kernels may be used on, by what a card says of itself: none is needed."""

from types import SimpleNamespace

import pytest

from mmattn.ops.backends import triton_packed
from mmattn.ops.triton_missing import _card_missing


def card(name, capability, shared_kib):
    major, minor = capability
    return SimpleNamespace(name=name, major=major, minor=minor, shared_memory_per_block_optin=shared_kib * 1024)


@pytest.mark.parametrize(
    ("name", "capability", "shared_kib", "version", "reason"),
    [
        ("A100", (8, 0), 163, "3.6.0", None),
        ("H200", (9, 0), 227, "3.6.0", None),
        (
            "RTX 4090",
            (8, 9),
            99,
            "3.6.0",
            "needs 163 KiB of shared memory a block (as an A100 or H100 has), RTX 4090 has",
        ),
        (
            "RTX 5090",
            (12, 0),
            99,
            "3.9.0",
            "needs 163 KiB of shared memory a block (as an A100 or H100 has), RTX 5090 has",
        ),
        # Compiled for these, kernels fail with Triton up to 3.7, or want more shared memory than there is up to 3.8.
        (
            "B200",
            (10, 0),
            227,
            "3.8.1",
            "needs triton 3.9 or newer on B200 (compute capability 10.0), 3.8.1 is installed",
        ),
        (
            "B300",
            (10, 3),
            227,
            "3.6.0",
            "needs triton 3.9 or newer on B300 (compute capability 10.3), 3.6.0 is installed",
        ),
        ("B200", (10, 0), 227, "3.9.0", None),
    ],
)
def test_a_card_for_which_the_kernels_do_not_compile_is_refused(name, capability, shared_kib, version, reason):
    found = _card_missing(card(name, capability, shared_kib), version)
    assert (found is None) == (reason is None)
    assert reason is None or found.startswith(reason)


def test_auto_takes_no_packed_kernels_on_cards_whose_code_has_never_run(monkeypatch):
    key = SimpleNamespace(is_cuda=True, dtype=None, shape=(100, 2, 64), device="cuda")
    for capability, most in (((10, 0), 0), ((11, 0), 0), ((8, 0), triton_packed.AUTO_PACKED_MEAN_KEYS)):
        monkeypatch.setattr(triton_packed, "compute_capability", lambda device, known=capability: known)
        assert triton_packed.BACKEND.auto_packed_mean_keys(SimpleNamespace(key=key)) == most
