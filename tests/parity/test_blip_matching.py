"""Our matching network against stock `BlipForImageTextRetrieval`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from mmattn.models.vlm import MatchingNetwork, open_network
from tests.parity.blip_stock import assert_as_exact_as_stock, pixels, save_stock, stock_model, tokens


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[MatchingNetwork, nn.Module, nn.Module]:
    """Ours, stock in float32, stock in float64."""
    stock = stock_model("matching", seed=4)
    folder = save_stock(stock, Path(tmp_path_factory.mktemp("matching")))
    ours = open_network(folder)
    assert isinstance(ours, MatchingNetwork)
    return ours, stock, copy.deepcopy(stock).double()


@torch.no_grad()
def test_scores_are_stocks(pair):
    ours, stock, exact = pair
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 4:] = 0
    scores = ours.match_scores(ours.encode_images(pixels(3)), ids, mask)
    matched, cosines = [ours(pixels(3), ids, attention_mask=mask)], [scores.cosine]
    for model, pictures in ((stock, pixels(3)), (exact, pixels(3).double())):
        matched.append(model(ids, pictures, attention_mask=mask).itm_score)
        cosines.append(model(ids, pictures, attention_mask=mask, use_itm_head=False).itm_score.diagonal())
    assert_as_exact_as_stock(*matched)
    assert_as_exact_as_stock(*cosines)
    torch.testing.assert_close(scores.probability, matched[1].softmax(-1)[:, 1])


@torch.no_grad()
def test_cosines_of_all_pairs_are_stocks(pair):
    ours, stock, exact = pair
    ids = tokens(47, 7)  # many pairs: the largest error of a few is a matter of luck
    own = ours.embed_images(ours.encode_images(pixels(3))) @ ours.embed_texts(ids).T
    assert_as_exact_as_stock(
        own,
        stock(ids, pixels(3), use_itm_head=False).itm_score,
        exact(ids, pixels(3).double(), use_itm_head=False).itm_score,
    )


@torch.no_grad()
def test_texts_share_the_pictures_keys_and_values(pair):
    ours, _, _ = pair
    ids, features = tokens(6, 7), ours.encode_images(pixels(2))
    shared = ours.match_scores(features, ids, context=ours.project_context(features))
    repeated = ours.match_scores(features.repeat_interleave(3, dim=0), ids)
    torch.testing.assert_close(shared.probability, repeated.probability)
    torch.testing.assert_close(shared.cosine, repeated.cosine)
