"""Choosing a backend: the table, precedence, refusals with every reason, explanations."""

import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import mmattn
from mmattn.errors import BackendError, UsageError
from mmattn.ops import registry
from mmattn.ops.attention import attention
from mmattn.ops.backends import sdpa
from mmattn.ops.observe import observing
from mmattn.ops.registry import TABLE, backends, checkpoint_contexts, explain, use_backend

NAMES = ["triton_packed", "varlen", "triton", "triton_decode", "flash", "sdpa", "flex", "eager"]


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 7, generator=generator) for _ in range(3)]


def backend_used(*args, **kwargs):
    calls = []
    with observing(calls.append):
        attention(*args, **kwargs)
    return calls[0].backend


def test_what_is_compiled_does_not_depend_on_earlier_choices(inputs, monkeypatch):
    """The table of choices grows with every kind of call: a guard on it would compile the same call again."""
    monkeypatch.setattr(registry, "_CHOICES", {})
    counter = CompileCounter()
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    expected = compiled(*inputs)
    assert torch.equal(compiled(*inputs), expected)
    assert registry._CHOICES == {}
    assert torch.equal(attention(*inputs), expected)
    attention(*inputs, is_causal=True)
    assert len(registry._CHOICES) == 2
    assert torch.equal(compiled(*inputs), expected)
    assert counter.frame_count == 1


def test_table_of_this_machine():
    table = mmattn.backends()
    assert [row.name for row in table] == NAMES
    assert "flash" in table
    assert "fast" not in table
    assert table["sdpa"] in table
    assert table["sdpa"].is_usable
    assert table["eager"].usable_on[0] == "cpu"
    assert table["sdpa"].versions["torch"] == torch.__version__
    assert table["varlen"].usable_on == table["flash"].usable_on == () or torch.cuda.is_available()
    assert "masks: cuda causal, key (not causal and key in one); backward on cuda;" in table["varlen"].supports
    assert "head_dim 8 to 256 in steps of 8" in table["varlen"].supports
    assert "grouped heads, packed sequences, no dropout" in table["varlen"].supports
    assert "grouped heads, dropout, packed sequences" in table["flash"].supports
    assert "flash-attn" in table["flash"].versions
    text = str(table)
    for part in ("sdpa: usable on cpu", "known bad: cuDNN", "flex: ", "auto: never", "eager: ", "backward on cuda"):
        assert part in text
    if not torch.cuda.is_available():
        assert "sees no cuda device here" in table["eager"].reasons["cuda"]
    with pytest.raises(KeyError, match=f"there are: {', '.join(NAMES)}"):
        table["fast"]


def test_auto_takes_sdpa_and_eager_for_weights(inputs):
    assert backend_used(*inputs) == "sdpa"
    assert backend_used(*inputs, return_weights=True) == "eager"


def test_argument_before_context_before_auto(inputs):
    with use_backend("eager"):
        assert backend_used(*inputs) == "eager"
        assert backend_used(*inputs, backend="sdpa") == "sdpa"
        with use_backend("auto"):
            assert backend_used(*inputs) == "sdpa"
        with use_backend("sdpa", role="cross"):
            assert backend_used(*inputs, role="cross") == "sdpa"
            assert backend_used(*inputs, role="self") == "eager"
            assert backend_used(*inputs) == "eager"
    assert backend_used(*inputs, role="self") == "sdpa"


def test_a_role_leaves_the_others_alone(inputs):
    with use_backend("eager", role="self"):
        assert backend_used(*inputs, role="self") == "eager"
        assert backend_used(*inputs, role="cross") == "sdpa"
        assert backend_used(*inputs) == "sdpa"


def test_context_is_left_after_an_error_and_not_seen_by_other_threads(inputs):
    with pytest.raises(RuntimeError), use_backend("eager"):
        raise RuntimeError
    assert backend_used(*inputs) == "sdpa"
    seen = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backend_used(*inputs)))
        thread.start()
        thread.join()
    assert seen == ["sdpa"]


def test_named_backend_never_falls_back(inputs):
    with pytest.raises(BackendError, match="'sdpa' cannot serve this call: returning the weights"):
        attention(*inputs, backend="sdpa", return_weights=True)
    with pytest.raises(BackendError, match="returning the weights"), use_backend("sdpa"):
        attention(*inputs, return_weights=True)


def test_refusal_names_every_reason(inputs):
    query, key, value = (tensor.double().requires_grad_() for tensor in inputs)
    bias = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(BackendError) as refusal:
        attention(query, key, value, attn_mask=bias, dropout_p=0.1, backend="flex", return_weights=True)
    message = str(refusal.value)
    assert "\n" not in message
    for reason in (
        "dtype float64 on cpu (serves float32, bfloat16, float16)",
        "gradients on cpu (has a backward on cuda)",
        "float mask on cpu (serves causal, key)",
        "gradients of a float mask",
        "dropout",
        "returning the weights",
    ):
        assert reason in message
    meta = torch.empty(1, 1, 1, 8, device="meta")
    with pytest.raises(BackendError, match=r"serves device meta \(only cuda, cpu\).*FakeTensorMode"):
        attention(meta, meta, meta)
    narrow = torch.empty(1, 1, 1, 0)
    with pytest.raises(BackendError, match=r"call. sdpa: head_dim 0 \(serves 1 to any\). eager: head_dim 0 [^.]*$"):
        attention(narrow, narrow, narrow)


def test_explain(inputs):
    explanation = explain(*inputs)
    assert (explanation.chosen, explanation.source) == ("sdpa", "auto")
    assert "flex: auto does not choose it on cpu" in str(explanation)
    assert "eager: could serve, but comes later in the table" in str(explanation)
    explanation = explain(*inputs, return_weights=True)
    assert explanation.chosen == "eager"
    assert explanation.reasons["sdpa"] == ["returning the weights"]
    with use_backend("sdpa", role="cross"):
        explanation = explain(*inputs, return_weights=True, role="cross")
    assert (explanation.chosen, explanation.asked, explanation.source) == (None, "sdpa", "use_backend")
    assert "no backend serves this call" in str(explanation)


def test_explanation_agrees_with_what_is_done(inputs):
    for weights in (False, True):
        for name in ("auto", *(backend.name for backend in TABLE if backend.name != "flex")):
            chosen = explain(*inputs, backend=name, return_weights=weights).chosen
            if chosen is None:
                with pytest.raises(BackendError):
                    attention(*inputs, backend=name, return_weights=weights)
            else:
                assert backend_used(*inputs, backend=name, return_weights=weights) == chosen


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: attention(x, x, x, backend="fast"), "unknown attention backend 'fast'; use one of: auto, tri"),
        (lambda x: use_backend("fast").__enter__(), "unknown attention backend 'fast'"),
        (lambda x: use_backend("sdpa", role="both").__enter__(), "unknown attention role 'both'"),
        (lambda x: attention(x, x, x, role="both"), "unknown attention role 'both'"),
    ],
)
def test_unknown_names(inputs, call, message):
    with pytest.raises(UsageError, match=message):
        call(inputs[0])


def test_recomputation_sees_the_backend_of_the_forward(inputs):
    """Gradient checkpointing recomputes in the backward, after the block, maybe in another thread."""
    query, key, value = (tensor.requires_grad_() for tensor in inputs)
    used = []

    def layer(query, key, value):
        used.append(explain(query, key, value).chosen)
        return attention(query, key, value)

    def run(context_fn):
        used.clear()
        with use_backend("eager"):
            output = checkpoint(layer, query, key, value, use_reentrant=False, context_fn=context_fn)
        thread = threading.Thread(target=output.sum().backward)
        thread.start()
        thread.join()
        return used

    assert checkpoint_contexts is mmattn.ops.checkpoint_contexts
    assert run(checkpoint_contexts) == ["eager", "eager"]


def test_every_backend_file_is_a_row():
    assert {backend.run.__module__.rsplit(".", 1)[-1] for backend in TABLE} == set(NAMES)
    assert len(backends()) == len(TABLE)


@pytest.mark.parametrize(
    ("queries", "kv_heads", "has_mask", "has_grad", "capability", "is_avoided"),
    [
        (7, 8, True, True, 9, True),
        (1, 8, False, True, 9, True),
        (7, 8, False, True, 9, False),
        (7, 8, True, False, 9, False),
        (7, 2, False, False, 10, True),
        (7, 8, False, False, 10, False),
        (7, 2, False, False, 9, False),
    ],
)
def test_known_bad_cudnn_calls_avoid_cudnn(monkeypatch, queries, kv_heads, has_mask, has_grad, capability, is_avoided):
    monkeypatch.setattr(sdpa, "compute_capability", lambda device: (capability, 0))
    query = torch.zeros(1, 8, queries, 8, requires_grad=has_grad)
    key = torch.zeros(1, kv_heads, 5, 8)
    mask = torch.ones(1, 1, queries, 5, dtype=torch.bool) if has_mask else None
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with sdpa._safe_kernels(query, key, key, mask):
        assert torch.backends.cuda.cudnn_sdp_enabled() == (before and not is_avoided)
        assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
