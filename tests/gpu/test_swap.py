"""Swapped attention in diffusers on a card: the same output by the rule, proof on request, everything back."""

from __future__ import annotations

import pytest
import torch

import mmattn
from mmattn.errors import BackendError
from mmattn.ops.observe import observing
from tests.gpu.card import BACKENDS, DEVICE, HALF_TYPES, MARKS
from tests.swap.diffusers_pieces import Picture, check_by_the_rule
from tests.swap.zoo import FAMILIES

pytestmark = MARKS
KEYS = ("sd1", "sdxl", "sd1_ip_adapter", "pixart", "flux")


def build(key: str, dtype: torch.dtype = torch.float32):
    return FAMILIES[key].build().to(DEVICE, dtype)


@pytest.mark.parametrize("key", KEYS)
def test_the_output_stays_the_same_and_restoring_leaves_no_trace(key):
    family, built = FAMILIES[key], build(key)
    before = Picture(built)
    stock = family.run(built)
    swapped = mmattn.swap_attention(built)
    ours = family.run(built)
    check_by_the_rule(ours, stock, lambda: family.run(built))
    verification = swapped.verify()
    assert verification.is_ok, str(verification)
    assert swapped.restore() == []
    assert before.differences(Picture(built)) == []
    assert torch.equal(family.run(built), stock)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("key", ["sd1", "sdxl", "pixart"])
def test_half_types(key, dtype):
    built = build(key, dtype)
    with mmattn.swap_attention(built) as swapped:
        verification = swapped.verify()
        assert FAMILIES[key].run(built).isfinite().all()
    assert verification.is_ok, str(verification)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_named_backend(name):
    """It serves every layer, or says before anything is changed why it cannot."""
    family, built = FAMILIES["sd1"], build("sd1", torch.float16)
    seen = set()
    try:
        swapped = mmattn.swap_attention(built, backend=name)
    except BackendError as error:
        assert name in str(error)  # noqa: PT017 (either outcome is right)
        return
    with swapped, observing(lambda call: seen.add(call.backend)):
        family.run(built)
    assert seen == {name}


def test_a_compiled_unet():
    unet = build("sd1").unet
    inputs = {"sample": torch.randn(2, 4, 16, 12), "encoder_hidden_states": torch.randn(2, 77, 48)}
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    with torch.no_grad():
        stock = unet(**inputs, timestep=torch.tensor(10)).sample
        with mmattn.swap_attention(unet):
            unet.compile_repeated_blocks(fullgraph=True)
            ours = unet(**inputs, timestep=torch.tensor(10)).sample
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4 * stock.abs().max().item())
