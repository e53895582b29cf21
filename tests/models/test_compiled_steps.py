"""Without a card: what is captured as a CUDA graph is chosen for being replayed, and made anew after a change; buffers
are lent to one at a time."""

import contextlib
import functools
import sys
import threading
from unittest import mock

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from mmattn.errors import UsageError
from mmattn.models import compiled_decoder
from mmattn.models.compiled_decoder import decoding_step
from mmattn.models.compiled_steps import captured
from mmattn.models.static_decoding import StepShape
from mmattn.models.translator import CompiledDecoder
from mmattn.ops.replay import is_replayed
from tests.models.tiny_translator import tiny_config, tiny_network


@pytest.fixture
def no_card(monkeypatch):
    """torch.cuda's graphs, which do nothing."""
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())


@pytest.mark.usefixtures("no_card")
def test_warm_ups_and_capture_are_for_replaying():
    seen = []

    def step(number):
        seen.append(is_replayed())
        return number

    run = captured(step, [7], torch.device("cuda"))
    assert seen == [True] * 3
    assert run() == 7
    assert seen == [True] * 3
    assert not is_replayed()


@pytest.mark.usefixtures("no_card")
def test_a_capture_that_fails_leaves_the_stream_of_before(monkeypatch):
    current = ["before"]

    @contextlib.contextmanager
    def entered(stream):
        previous, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = previous

    @contextlib.contextmanager
    def failing(*_, **__):
        current[0] = "of the capture"
        yield
        raise RuntimeError("invalidated by a wait")  # as torch does, before it goes back

    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock(side_effect=lambda: mock.MagicMock(of=current[0])))
    monkeypatch.setattr(torch.cuda, "graph", failing)
    with pytest.raises(RuntimeError, match="invalidated"):
        captured(lambda number: number, [7], torch.device("cuda"))
    assert current == ["before"]


@pytest.mark.parametrize("is_captured", [False, True])
def test_decoding_steps_are_compiled_for_it(monkeypatch, is_captured):
    seen = []

    def backend(graph, _):
        seen.append(is_replayed())
        return graph

    decoder = CompiledDecoder(tiny_network(tiny_config(decoder_layers=2)), backend=backend, idle_bytes=0)
    monkeypatch.setattr(decoder, "_captures", lambda device: is_captured)
    monkeypatch.setattr(compiled_decoder, "captured", lambda step, tensors, _: functools.partial(step, *tensors))
    decoder.lend(StepShape(2, 1, 64, 64, is_masked=True)).run()
    assert seen == [is_captured]


SHAPE = StepShape(2, 1, 64, 64, is_masked=True)


@pytest.fixture
def steps(monkeypatch):
    """A decoder with an adapter, whose captures give for ever what they gave when they were made."""

    def frozen(step, tensors, _):
        logits, weights = step(*tensors)
        return lambda: (logits, weights)

    network = tiny_network(tiny_config(decoder_layers=2)).eval()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, network.decoder)
    made = CompiledDecoder(network, backend="eager", idle_bytes=2**24)
    monkeypatch.setattr(made, "_captures", lambda device: True)
    monkeypatch.setattr(compiled_decoder, "captured", frozen)
    return made


def taken(steps):
    """The logits of a step in buffers that are lent for it, and these; they must be those of the network as it is."""
    buffers = steps.lend(SHAPE)
    logits, _ = buffers.run()
    with torch.inference_mode():
        expected, _ = decoding_step(steps.decoder, None, *buffers.tensors)
    torch.testing.assert_close(logits, expected)
    steps.give_back(buffers)
    return logits, buffers


def scaled(decoder):
    decoder.layers[1].ffn.up_proj.set_scale("default", 7.0)


def disabled(decoder):
    decoder.layers[1].ffn.up_proj.enable_adapters(False)


def replaced(decoder):
    up = decoder.layers[1].ffn.up_proj.base_layer
    up.weight = torch.nn.Parameter(-up.weight.detach())


def added(decoder):
    layer = decoder.layers[1]
    layer.ffn.up_proj = torch.nn.Sequential(layer.ffn.up_proj, torch.nn.Hardtanh(-0.01, 0.01))


@pytest.mark.parametrize("change", [scaled, disabled, replaced, added])
def test_what_was_captured_is_left_after_a_change(steps, change):
    before, buffers = taken(steps)
    assert taken(steps)[1] is buffers
    change(steps.decoder)
    after, others = taken(steps)
    assert others is not buffers
    assert steps.idle == [others]
    assert not torch.allclose(before, after, atol=1e-4)
    assert taken(steps)[1] is others


def test_another_backend_of_a_layer_or_mode_of_a_part_is_captured_anew(steps):
    _, buffers = taken(steps)
    for change in (
        functools.partial(setattr, steps.decoder.layers[1].self_attn, "backend", "eager"),
        steps.decoder.layers[0].train,
        steps.decoder.bfloat16,
    ):
        change()
        again = steps.lend(SHAPE)
        assert again is not buffers
        steps.give_back(again)
        assert steps.idle == [again]
        buffers = again


def test_buffers_lent_before_a_change_are_not_lent_again(steps):
    buffers = steps.lend(SHAPE)
    scaled(steps.decoder)
    taken(steps)
    steps.give_back(buffers)
    assert buffers not in steps.idle
    assert steps.num_lent == 0


def test_hooks_and_other_forwards_are_refused(steps):
    _, buffers = taken(steps)
    ffn = steps.decoder.layers[1].ffn
    hook = ffn.register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match="compile: a FeedForward of the decoder has a forward hook, which a compiled"):
        steps.lend(SHAPE)
    hook.remove()
    hook = steps.decoder.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(UsageError, match="compile: the decoder has a forward hook, which a compiled step would pass"):
        steps.lend(SHAPE)
    hook.remove()
    ffn.forward = ffn.forward
    with pytest.raises(UsageError, match="compile: layers.1.ffn has another forward or hooks of accelerate or diffus"):
        steps.lend(SHAPE)
    del ffn.forward
    assert taken(steps)[1] is buffers
    assert steps.num_lent == 0


def test_threads_never_share_buffers(steps):
    held, lock, wrong = set(), threading.Lock(), []

    def work(shape):
        for _ in range(31):
            buffers = steps.lend(shape)
            with lock:
                wrong.extend([buffers] if id(buffers) in held or buffers.shape != shape else [])
                held.add(id(buffers))
            buffers.run()
            with lock:
                held.remove(id(buffers))
            steps.give_back(buffers)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        shapes = [SHAPE, StepShape(4, 1, 64, 64, is_masked=True)]
        threads = [threading.Thread(target=work, args=(shapes[number % 2],)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert steps.num_lent == 0
    assert len({id(each) for each in steps.idle}) == len(steps.idle) <= 5
    assert {each.shape for each in steps.idle} == set(shapes)


@pytest.mark.parametrize("is_other_thread", [False, True])
def test_giving_back_waits_for_no_compilation(steps, is_other_thread):
    """Finalizers do it, wherever the garbage collector runs: in the compilation itself, or in what that waits for."""
    buffers, seen = steps.lend(SHAPE), []

    def backend(graph, _):
        if is_other_thread:
            thread = threading.Thread(target=steps.give_back, args=(buffers,), daemon=True)
            thread.start()
            thread.join(timeout=60)
            seen.append(not thread.is_alive())
        else:
            steps.give_back(buffers)
            seen.append(True)
        return graph

    steps._backend = backend
    other = steps.lend(StepShape(1, 1, 64, 64, is_masked=True))
    assert seen == [True]
    assert steps.idle == [buffers]
    assert steps.num_lent == 1
    steps.give_back(other)
    assert steps.idle == [buffers, other]
