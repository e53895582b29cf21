"""scripts/gpu/training.py: what attention its recipes' calls come to on a card, as far as a CPU can tell."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from mmattn.config import load_config, load_recipe
from mmattn.ops import packed
from mmattn.ops.backends import triton_packed
from mmattn.ops.registry import TABLE

ROOT = Path(__file__).resolve().parents[2]
# The same calls in fewer layers, from fewer examples.
FEWER = {
    "translate": ["data.size=300", *[f"model.network.{side}_layers=1" for side in ("encoder", "decoder")]],
    "vlm": ["data.size=40", "model.network.image.num_layers=1", "model.network.text.num_layers=1"],
}
NUM_EXAMPLES = 16


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "gpu"))
    path = list(sys.path)
    found = importlib.import_module("training").SIZES
    sys.path[:] = path  # else transformers would take scripts/accept/kernels.py for a package of that name
    yield found
    for name in ("training", "measure", "processes", "side_by_side", "kill_resume"):
        sys.modules.pop(name, None)


def on_a_card(traits, request):
    """The row that "auto" takes there under autocast to bfloat16."""
    theirs = traits._replace(device="cuda", dtype=torch.bfloat16)
    rows = [row for row in TABLE if row.run_packed is not None and not row.limits.refusals(theirs)]
    return next(row.name for row in rows if row.suits_packed(request))


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        # Of an encoder, of a decoder, and of a decoder on an encoder.
        (
            "translate",
            {("self", False): "triton_packed", ("self", True): "triton_packed", ("cross", False): "triton_packed"},
        ),
        # 197 places of a picture are just within what was measured.
        ("vlm", {("self", True): "triton_packed", ("cross", False): "triton_packed"}),
    ],
)
def test_packed_calls_of_training_take_the_kernels_for_short_sequences(sizes, recipe, wanted, monkeypatch, tmp_path):
    overrides = [*sizes[recipe], *FEWER[recipe], f"training.output_dir={tmp_path}"]
    module = load_recipe(recipe)
    task = module.open_task(load_config(module.Config, f"{recipe}/debug", overrides))
    found = {}
    choose = packed.choose_packed
    # As for bfloat16 and heads of 64 there.
    monkeypatch.setattr(triton_packed, "AUTO_PACKED_MEAN_KEYS", triton_packed.AUTO_PACKED_MEAN_KEYS_MEASURED)

    def spy(name, traits, request):
        same = request.query_segments is request.key_segments
        assert name == "auto"
        found["self" if same else "cross", request.is_causal] = on_a_card(traits, request)
        return choose(name, traits, request)

    monkeypatch.setattr(packed, "choose_packed", spy)
    task.model.train()
    loss = task.loss(task.model, task.collate([(0, example) for example in range(NUM_EXAMPLES)]))
    assert torch.isfinite(loss.total)
    assert found == wanted
