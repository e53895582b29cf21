"""Our question answering network against stock `BlipForQuestionAnswering`, one example at a time where masks differ."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from mmattn.models.vlm import QuestionAnsweringNetwork, open_network
from tests.parity.blip_stock import BOS, assert_as_exact_as_stock, pixels, save_stock, stock_model, tokens
from tests.parity.test_blip_captioning import greedy


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuestionAnsweringNetwork, nn.Module, nn.Module]:
    """Ours, stock in float32, stock in float64."""
    stock = stock_model("question_answering", seed=3)
    folder = save_stock(stock, Path(tmp_path_factory.mktemp("questions")))
    ours = open_network(folder)
    assert isinstance(ours, QuestionAnsweringNetwork)
    return ours, stock, copy.deepcopy(stock).double()


def _stock_question_states(model: nn.Module, pictures, ids, mask):
    features = model.vision_model(pictures).last_hidden_state
    return model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=features).last_hidden_state


@torch.no_grad()
def test_question_states_are_stocks(pair):
    ours, stock, exact = pair
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    found: list[list[torch.Tensor]] = [[], [], []]
    # Several draws: the largest error of one is a matter of luck with a processor's order of summing.
    for seed in range(4):
        ids = tokens(2, 9, seed=seed)
        states = [
            ours.encode_questions(ours.encode_images(pixels(2)), ids, mask).hidden,
            _stock_question_states(stock, pixels(2), ids, mask),
            _stock_question_states(exact, pixels(2).double(), ids, mask),
        ]
        for of_all, state in zip(found, states, strict=True):
            of_all.append(state[mask.bool()])
    assert_as_exact_as_stock(*map(torch.cat, found))


@torch.no_grad()
def test_loss_is_stocks_where_no_question_is_padded(pair):
    # With padding they differ: stock loses the question's mask on its way to the answer decoder's cross-attention.
    ours, stock, exact = pair
    questions, answers = tokens(3, 8), tokens(3, 5, seed=7)
    answers[1, 3:] = -100
    ids = answers.clamp_min(0)
    output = ours(pixels(3), questions, ids, labels=answers)
    arguments = {"input_ids": questions, "decoder_input_ids": ids, "labels": answers}
    losses = [
        output.loss_sum / output.num_tokens,
        stock(pixel_values=pixels(3), **arguments).loss,
        exact(pixel_values=pixels(3).double(), **arguments).loss,
    ]
    assert_as_exact_as_stock(*[loss[None] for loss in losses])


@torch.no_grad()
def test_padded_questions_give_the_losses_of_the_questions_alone(pair):
    ours, _, _ = pair
    questions, answers, mask = tokens(2, 8), tokens(2, 5, seed=7), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    together = ours(pixels(2), questions, answers, question_mask=mask, labels=answers).loss_sum
    first = ours(pixels(2)[:1], questions[:1], answers[:1], labels=answers[:1]).loss_sum
    second = ours(pixels(2)[1:], questions[1:, :5], answers[1:], labels=answers[1:]).loss_sum
    torch.testing.assert_close(together, first + second)


@torch.no_grad()
def test_greedy_answers_are_stocks(pair):
    ours, stock, _ = pair
    for index in range(4):
        picture, question = pixels(4)[index : index + 1], tokens(1, 5 + index, seed=index)
        states = ours.encode_questions(ours.project_context(ours.encode_images(picture)), question)
        found = greedy(ours.start(states, max_length=18), torch.tensor([[BOS]]), 17)
        expected = stock.generate(question, picture, max_new_tokens=17, do_sample=False)
        assert found == expected[0, 1:].tolist()


@torch.no_grad()
def test_padding_of_a_question_does_not_change_its_answer(pair):
    ours, _, _ = pair
    short, mask = tokens(1, 5), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    padded = torch.cat([short, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    features = ours.encode_images(pixels(1))
    alone = ours.start(ours.encode_questions(features, short), max_length=4)
    among = ours.start(ours.encode_questions(features, padded, mask), max_length=4)
    bos = torch.tensor([[BOS]])
    torch.testing.assert_close(alone.logits(bos), among.logits(bos))


@torch.no_grad()
def test_questions_share_the_pictures_keys_and_values(pair):
    ours, _, _ = pair
    questions = tokens(6, 7)
    context = ours.project_context(ours.encode_images(pixels(2)))
    assert {kv.batch_size for kv in context} == {2}
    shared = ours.encode_questions(context, questions)
    alone = [
        ours.encode_questions(ours.encode_images(pixels(2)[row // 3][None]), questions[row][None]).hidden
        for row in range(6)
    ]
    torch.testing.assert_close(shared.hidden, torch.cat(alone))
    picked = shared.select(torch.tensor([4, 1]))
    assert torch.equal(picked.hidden, shared.hidden[[4, 1]])
