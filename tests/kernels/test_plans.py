"""Remembered launches: equal to those that Triton makes anew in every call, whatever the call; on a card that is not
there (kernels are compiled for it, and their arguments seen)."""

import threading
import warnings

import pytest
import torch
from packaging.version import Version

pytest.importorskip("triton")

import triton

from mmattn.kernels import plans, short_keys
from mmattn.kernels.launch import is_interpreted
from mmattn.kernels.plans import alignment
from mmattn.kernels.short_keys import attend, short_key_attention, short_key_attention_backward
from mmattn.kernels.short_keys_backward import keys_bwd_kernel
from mmattn.kernels.short_keys_backward_queries import queries_bwd_kernel
from mmattn.kernels.short_keys_backward_split import split_bwd_kernel
from mmattn.kernels.short_keys_backward_sums import sum_partials_kernel
from mmattn.kernels.short_keys_forward import resident_fwd_kernel, streamed_fwd_kernel
from tests.kernels.faked_card import DEVICE, faked_card

KERNELS = (
    resident_fwd_kernel,
    streamed_fwd_kernel,
    keys_bwd_kernel,
    queries_bwd_kernel,
    split_bwd_kernel,
    sum_partials_kernel,
)
pytestmark = pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")


@pytest.fixture
def launched(monkeypatch):
    """What was launched, in order; nothing is planned yet."""
    monkeypatch.setattr(short_keys._FORWARD, "plans", {})
    monkeypatch.setattr(short_keys._BACKWARD, "plans", {})
    with faked_card() as launched:
        yield launched


def draw(length, heads=3, head_dim=40, batch=2, dtype=torch.float16, skip=0):
    """[B, H, L, D] in the storage order [B, L, H, D], `skip` elements from where an allocation begins."""
    flat = torch.zeros(batch * length * heads * head_dim + skip, dtype=dtype)[skip:]
    return flat.view(batch, length, heads, head_dim).transpose(1, 2)


def masks(keys=13, queries=17):
    mask = torch.ones(2, 1, 2 * keys, dtype=torch.bool)
    return {
        "none": (None, None),
        "key": (mask[..., :keys], None),
        "odd key": (mask[..., 1 : keys + 1], None),
        "boolean": (None, torch.ones(1, 3, queries, keys, dtype=torch.bool)),
        "both": (mask[..., ::2], torch.ones(queries, keys, dtype=torch.bool)[None, None]),
    }


CALLS = {
    "plain": {},
    "one head": {"heads": 1},
    "one of everything": {"heads": 1, "batch": 1, "head_dim": 1, "queries": 1, "keys": 1},
    "odd head": {"head_dim": 23},
    "bfloat16": {"dtype": torch.bfloat16},
    "other lengths": {"queries": 1021, "keys": 77},
    "more keys than a program holds": {"keys": 293, "queries": 19},
    "a gradient a program": {"queries": 131, "keys": 77, "head_dim": 64},
    "a gradient a program, shared out": {"queries": 257, "keys": 77, "head_dim": 160, "heads": 1, "batch": 1},
    "query from odd address": {"skip": (1, 0, 0)},
    "value from odd address": {"skip": (0, 0, 3)},
    "all from odd addresses": {"skip": (1, 5, 3)},
    "all 16 bytes on": {"skip": (8, 8, 8)},
}


def tensors_of(queries=17, keys=13, skip=(0, 0, 0), **sizes):
    return [draw(length, skip=each, **sizes) for length, each in zip((queries, keys, keys), skip, strict=True)]


def addresses(arguments):
    """What the launcher gets of them: a tensor's address, everything else as it is."""
    return [argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in arguments]


# Every mask once where addresses are even, and once where they are odd: compiling takes a second each.
MASKED = [(name, mask) for name in ("plain", "all from odd addresses") for mask in masks() if mask != "none"]


@pytest.mark.parametrize(("name", "mask"), [*((name, "none") for name in CALLS), *MASKED])
def test_planned_launches_are_those_that_triton_makes(launched, name, mask):
    """The same compiled kernel, programs, and arguments; only outputs and buffers are other tensors."""
    query, key, value = tensors_of(**CALLS[name])
    key_mask, attn_mask = masks()[mask]
    runs = []
    for _ in range(3):
        launched.clear()
        output, lse = short_key_attention(query, key, value, key_mask, attn_mask, 0.3)
        short_key_attention_backward(output, query, key, value, output, lse, key_mask, attn_mask, 0.3)
        runs.append([(kernel, programs, addresses(arguments)) for kernel, programs, arguments in launched])
    assert len(short_keys._FORWARD.plans) == len(short_keys._BACKWARD.plans) == 1
    known = {tensor.data_ptr() for tensor in (query, key, value, key_mask, attn_mask) if tensor is not None}
    for made, planned, again in zip(*runs, strict=True):
        assert made[:2] == planned[:2] == again[:2]
        for run in (planned, again):
            for first, other in zip(made[2], run[2], strict=True):
                # What is no tensor of the caller's is an address of this run's own.
                same = first in known or not isinstance(first, int) or first < 2**32
                assert first == other if same else other not in known


def test_outputs_and_buffers_stand_where_they_belong(launched):
    """Each pointer of a planned launch by the kernel's name for it."""
    query, key, value = tensors_of(keys=293)  # so many that the backward has a buffer of its own for delta
    for _ in range(2):
        launched.clear()
        output, lse = short_key_attention(query, key, value, None, None, 0.3)
        grad_output = draw(17)
        gradients = short_key_attention_backward(grad_output, query, key, value, output, lse, None, None, 0.3)
    expected = {
        "query_ptr": query, "key_ptr": key, "value_ptr": value, "output_ptr": output, "lse_ptr": lse,
        "grad_output_ptr": grad_output, "grad_query_ptr": gradients[0], "grad_key_ptr": gradients[1],
        "grad_value_ptr": gradients[2], "key_mask_ptr": key, "attn_mask_ptr": key,
    }  # fmt: skip
    buffers = {}
    for name, _, arguments in launched:
        kernel = next(kernel for kernel in KERNELS if kernel.__name__ == name)
        for pointer, argument in zip(kernel.arg_names, arguments, strict=True):
            if pointer.endswith("_ptr"):
                assert isinstance(argument, int)
                if pointer in expected:
                    assert argument == expected[pointer].data_ptr(), (name, pointer)
                else:
                    buffers.setdefault(pointer, []).append(argument)
    assert set(buffers) == {"delta_ptr", "partials_ptr"}
    assert all(len(found) == 2 and found[0] == found[1] for found in buffers.values())
    assert buffers["delta_ptr"] != buffers["partials_ptr"]


def specialised(kernel, arguments):
    """What Triton compiles for them."""
    binder = kernel.device_caches[DEVICE][4]
    named = dict(zip(kernel.arg_names, arguments, strict=True))
    _, specialisation, _ = binder(**named)
    return str(specialisation)


def test_calls_of_one_signature_are_one_to_triton(launched):
    """Whatever the call, what Triton specialises on follows from the signature; and no plan is made twice."""
    found = {}
    for sizes in (*CALLS.values(), *CALLS.values()):
        launched.clear()
        short_key_attention(*tensors_of(**sizes), None, None, 0.3)
        ((name, _, arguments),) = launched
        is_made = isinstance(arguments[0], torch.Tensor)
        if is_made:
            kernel = next(kernel for kernel in KERNELS if kernel.__name__ == name)
            found[list(short_keys._FORWARD.plans)[-1]] = name, specialised(kernel, arguments)
    # "All 16 bytes on" is "plain".
    assert len(found) == len(short_keys._FORWARD.plans) == len(CALLS) - 1
    # Of these, other addresses alone make other kernels of the same sizes.
    assert len({text for _, text in found.values()}) >= len(CALLS) - 2


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [((0, 16, 4096), True), ((16, 8, 32), (True, False, True)), ((1, 2, 15), (False, False, False)), ((0, 0), True)],
)
def test_alignment(addresses, expected):
    assert alignment(addresses) == expected


def test_the_oldest_plan_is_forgotten(launched, monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 3)
    for queries in (2, 3, 5, 7, 11):
        attend(*tensors_of(queries=queries), None, None, 0.3)
    kept = [signature[0][2][0][2] for signature in short_keys._FORWARD.plans]
    assert kept == [5, 7, 11]
    launched.clear()
    attend(*tensors_of(queries=2), None, None, 0.3)
    assert isinstance(launched[0][2][0], torch.Tensor)


def test_other_scales_are_other_calls(launched):
    tensors = tensors_of()
    for scale in (0.3, 0.7, 0.3):
        attend(*tensors, None, None, scale)
    place = resident_fwd_kernel.arg_names.index("scale")
    found = [arguments[place] for _, _, arguments in launched]
    assert found[0] == found[2] != found[1]
    assert found[1] / found[0] == pytest.approx(7 / 3)


def test_threads_share_plans(launched):
    tensors = tensors_of()
    attend(*tensors, None, None, 0.3)
    problems = []

    def run():
        try:
            for queries in (17, 19, 23, 29, 31) * 5:
                attend(*tensors_of(queries=queries), None, None, 0.3)
        except Exception as error:  # a thread's exception is lost otherwise
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(launched) == 1 + 4 * 25
    assert len(short_keys._FORWARD.plans) == 5


def test_a_version_that_was_not_tried_is_launched_the_ordinary_way(launched, monkeypatch):
    """And says so, once."""
    oldest, beyond = map(Version, plans.TRIED)
    assert oldest <= Version(triton.__version__) < beyond
    monkeypatch.setattr(triton, "__version__", "99.1.0")
    plans._is_tried.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"tried with triton 3\.6 up to .*, this is 99\.1\.0: they are launched the"
        ):
            attend(*tensors_of(), None, None, 0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attend(*tensors_of(), None, None, 0.3)
    finally:
        plans._is_tried.cache_clear()
    assert not short_keys._FORWARD.plans
    assert all(isinstance(arguments[0], torch.Tensor) for _, _, arguments in launched)
