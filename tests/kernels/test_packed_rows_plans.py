"""Remembered launches of the kernels for packed rows: equal to those that Triton makes anew, on a card that is not
there, for batches of other rows and sequences too."""

import pytest
import torch

pytest.importorskip("triton")

from mmattn.kernels import packed_rows
from mmattn.kernels.launch import is_interpreted
from mmattn.kernels.packed_rows import attend
from mmattn.kernels.packed_rows_backward import packed_keys_bwd_kernel, packed_queries_bwd_kernel
from mmattn.kernels.packed_rows_forward import packed_fwd_kernel
from mmattn.ops.segments import Segments
from tests.kernels.faked_card import faked_card

KERNELS = {kernel.__name__: kernel for kernel in (packed_fwd_kernel, packed_queries_bwd_kernel, packed_keys_bwd_kernel)}
pytestmark = pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")


@pytest.fixture
def launched(monkeypatch):
    """What was launched, in order; nothing is planned yet."""
    monkeypatch.setattr(packed_rows._FORWARD, "plans", {})
    monkeypatch.setattr(packed_rows._BACKWARD, "plans", {})
    with faked_card() as launched:
        yield launched


def named(launch):
    """(kernel, programs, arguments by name), tensors as addresses."""
    name, programs, arguments = launch
    numbers = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
    return name, programs, dict(zip(KERNELS[name].arg_names, numbers, strict=True))


def batch_of(queries, keys):
    """Zeros of six heads over two, and where the sequences lie."""
    segments = [Segments.of(lengths) for lengths in (queries, keys)]
    query, key, value = (
        torch.zeros(sum(lengths), heads, 40, dtype=torch.float16, requires_grad=True)
        for lengths, heads in ((queries, 6), (keys, 2), (keys, 2))
    )
    return (query, key, value), [each.cu_seqlens for each in segments] + [each.row_numbers() for each in segments]


def run(launched, rows, places):
    launched.clear()
    output = attend(*rows, *places, True, 0.3)
    torch.autograd.grad(output, rows, torch.zeros_like(output))
    return [named(launch) for launch in launched]


def own_addresses(launches):
    """Launches without the addresses of what a call allocates."""
    own = ("output_ptr", "lse_ptr", "delta_ptr")
    return [
        (name, programs, {k: v for k, v in found.items() if k not in own and not k.startswith("grad_")})
        for name, programs, found in launches
    ]


def test_planned_launches_are_those_that_triton_makes(launched, monkeypatch):
    """Whichever batch of as many blocks came first."""
    batches = [batch_of([31, 5], [67, 2]), batch_of([13, 17, 1], [1, 67, 3]), batch_of([31, 5], [67, 2])]
    planned = [own_addresses(run(launched, *batch)) for batch in batches]
    assert len(packed_rows._FORWARD.plans) == len(packed_rows._BACKWARD.plans) == 1
    for batch, launches in zip(batches, planned, strict=True):
        monkeypatch.setattr(packed_rows._FORWARD, "plans", {})
        monkeypatch.setattr(packed_rows._BACKWARD, "plans", {})
        assert own_addresses(run(launched, *batch)) == launches
        assert [name for name, _, _ in launches] == list(KERNELS)
        for name, _, found in launches:
            assert found["num_queries"] == len(batch[0][0]), name
            assert found["num_sequences"] == len(batch[1][0]) - 1, name


def test_strides_of_results_are_those_of_the_call(launched):
    """Of rows that are parts of larger tensors, results lie otherwise for other numbers of rows."""
    whole = [torch.zeros(heads, 64, 40, dtype=torch.float16) for heads in (6, 2, 2)]
    side_by_side = torch.zeros(64, 3, 6, 40, dtype=torch.float16).unbind(1)
    for tensors in ([tensor.transpose(0, 1) for tensor in whole], side_by_side):
        for length in (1, 7, 19):
            segments = Segments.of([length])
            rows = [tensor[:length].detach().requires_grad_() for tensor in tensors]
            launches = run(launched, rows, [segments.cu_seqlens] * 2 + [segments.row_numbers()] * 2)
            found = {name: each for _, _, arguments in launches for name, each in arguments.items()}
            for name, row in zip(("query", "key", "value"), rows, strict=True):
                row_stride, head_stride, column_stride = torch.empty_like(row).stride()
                expected = (0, head_stride // 8, row_stride // 8, column_stride)
                assert found[f"grad_{name}_strides"] == expected
                if name == "query":
                    assert found["output_strides"] == expected


def test_kernels_hand_on_what_they_wrote(launched):
    rows, places = batch_of([31, 5], [67, 2])
    for _ in range(2):
        forward, of_queries, of_keys = (found for _, _, found in run(launched, rows, places))
        assert forward["output_ptr"] == of_queries["output_ptr"]
        assert forward["lse_ptr"] == of_queries["lse_ptr"] == of_keys["lse_ptr"]
        assert of_queries["delta_ptr"] == of_keys["delta_ptr"]
        assert len({of_queries["grad_query_ptr"], of_keys["grad_key_ptr"], of_keys["grad_value_ptr"]}) == 3
