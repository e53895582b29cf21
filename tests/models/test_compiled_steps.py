"""What is captured as a CUDA graph is chosen for being replayed; seen without a card."""

import contextlib
import functools
from unittest import mock

import pytest
import torch

from mmattn.models import compiled_decoder
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


@pytest.mark.parametrize("is_captured", [False, True])
def test_decoding_steps_are_compiled_for_it(monkeypatch, is_captured):
    seen = []

    def backend(graph, _):
        seen.append(is_replayed())
        return graph

    decoder = CompiledDecoder(tiny_network(tiny_config()), backend=backend, idle_bytes=0)
    monkeypatch.setattr(decoder, "_captures", lambda device: is_captured)
    monkeypatch.setattr(compiled_decoder, "captured", lambda step, tensors, _: functools.partial(step, *tensors))
    decoder.lend(StepShape(2, 1, 64, 64, is_masked=True)).run()
    assert seen == [is_captured]
