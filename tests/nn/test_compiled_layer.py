"""Packed layers under torch.compile: one graph, and no code for every total, count or length of sequences."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmattn.nn import TransformerLayer
from mmattn.ops import registry
from mmattn.ops.backends import varlen
from mmattn.ops.limits import Limits
from mmattn.ops.segments import PackedRequest, Segments
from mmattn.ops.unpadded import packed_rows

WIDTH, HEADS, LAYERS = 28, 4, 3


def _attend(request: PackedRequest) -> Tensor:
    """What a kernel for packed sequences computes, in operations that can be traced."""
    rows = packed_rows(request)
    own, other = torch.arange(rows.query.shape[0]), torch.arange(rows.key.shape[0])
    of_query = torch.bucketize(own, rows.query_starts[1:], right=True)
    of_key = torch.bucketize(other, rows.key_starts[1:], right=True)
    mask = of_query[:, None] == of_key
    if rows.is_causal:
        mask = mask & (other <= own[:, None])
    query, key, value = (heads.transpose(0, 1)[None] for heads in (rows.query, rows.key, rows.value))
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=rows.scale)[0].transpose(0, 1)
    return output * (rows.max_queries / rows.max_queries)  # a kernel is given it as a number


@pytest.fixture
def traceable_kernel(monkeypatch):
    limits = Limits(dtypes={"cpu": (torch.float64,)}, grad_devices=("cpu",), masks={"cpu": ("causal",)})
    row = dataclasses.replace(varlen.BACKEND, limits=limits, unusable=lambda device: None, run_packed=_attend)
    table = tuple(row if each.name == row.name else each for each in registry.TABLE)
    monkeypatch.setattr(registry, "TABLE", table)
    monkeypatch.setattr(registry, "_BY_NAME", {each.name: each for each in table})


@pytest.mark.parametrize("queries_per_context", [1, 3])
def test_one_graph_for_batches_of_any_sequences(traceable_kernel, queries_per_context):
    torch.manual_seed(5)
    draw = random.Random(5)
    layers = [
        TransformerLayer(WIDTH, HEADS, 44, has_cross_attention=True, is_causal=True).double() for _ in range(LAYERS)
    ]
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = [torch.compile(layer.forward, backend=backend, fullgraph=True) for layer in layers]
    for _ in range(5):
        count = draw.randint(3, 13)
        queries = Segments.of(draw.randint(1, 11) for _ in range(count * queries_per_context))
        contexts = Segments.of(draw.randint(1, 11) for _ in range(count))
        queries.merged(count)  # as models do, outside of their layers
        ours = plain = torch.randn(queries.total, WIDTH, dtype=torch.float64, requires_grad=True)
        context = torch.randn(contexts.total, WIDTH, dtype=torch.float64)
        for layer, forward in zip(layers, compiled, strict=True):
            options = {"context": context, "segments": queries, "context_segments": contexts}
            ours, plain = forward(ours, **options), layer(plain, **options)
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    torch.compiler.reset()
    assert len(graphs) == 2  # of the first sizes, and of all others
