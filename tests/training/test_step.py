"""The mathematics of a step."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from mmattn.errors import UsageError
from mmattn.training import Loss, read_metrics, train
from mmattn.training.batches import make_sampler
from mmattn.training.gradients import clip_whole_gradients
from mmattn.training.step import BufferGuard, run_step, seed_draws
from tests.training.toy import LENGTH, VOCAB, RaggedTask, ToyTask, toy_config

FLOAT64 = {"dropout_p": 0.0, "dtype": torch.float64, "has_batch_norm": False}


def gradients(micro_batch_sizes, task_class=ToyTask, **options):
    task = task_class(**FLOAT64)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in task.model.parameters() if p.requires_grad], lr=0.0)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    draws = [(0, example) for example in range(sum(micro_batch_sizes))]
    batches = []
    for size in micro_batch_sizes:
        batches.append(task.collate(draws[:size]))
        draws = draws[size:]
    result = run_step(task, model, optimizer, accelerator, batches, max_grad_norm=None, **options)
    return result, {name: p.grad for name, p in task.model.named_parameters() if p.requires_grad}


def test_unequal_micro_batches_equal_one_batch():
    whole, expected = gradients([11])
    for sizes in ([1, 7, 3], [5, 6], [1] * 11):
        result, found = gradients(sizes)
        assert result.count == whole.count
        assert result.loss == pytest.approx(whole.loss, abs=1e-12)
        assert result.grad_norm == pytest.approx(whole.grad_norm, abs=1e-9)
        assert result.parts["half"] == pytest.approx(whole.loss / 2)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def test_micro_batches_equal_one_batch_over_a_run(tmp_path):
    losses = [
        train(ToyTask(**FLOAT64), toy_config(tmp_path / str(size), batch_size=7, micro_batch_size=size)).losses
        for size in (None, 1, 3)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)


def test_batches_by_tokens_in_unequal_micro_batches_equal_one_batch_over_a_run(tmp_path):
    def run(name, **options):
        result = train(RaggedTask(**FLOAT64), toy_config(tmp_path / name, batch_tokens=20, **options))
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return result.losses, [line["grad_norm"] for line in lines], lines[-1]["examples"], lines[-1]["tokens"]

    whole, cut = run("whole"), run("cut", micro_batch_tokens=8)
    assert cut[0] == pytest.approx(whole[0], rel=1e-9)
    assert cut[1] == pytest.approx(whole[1], rel=1e-6)
    assert cut[2:] == whole[2:]
    sampler = make_sampler(RaggedTask(), toy_config(tmp_path, batch_tokens=20))
    draws = [draw for step in range(20) for draw in sampler.draws(step)]
    assert whole[2:] == (len(draws), sum(1 + example % LENGTH for _, example in draws))


def test_fill_ins_count_for_nothing():
    whole, expected = gradients([7, 3])
    result, found = gradients([7, 3, 5], num_scored=2)
    assert (result.loss, result.count, result.parts) == (whole.loss, whole.count, whole.parts)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    nothing, found = gradients([3], num_scored=0)
    assert (nothing.count, nothing.loss, nothing.skip_reason) == (0, 0.0, "the batch holds nothing to score")
    assert not any(gradient.any() for gradient in found.values())


def test_an_auxiliary_loss_per_scored_token_is_exact_and_logged_by_its_own_count():
    """As fairseq divides its guided alignment loss; `parts` may have another count."""

    class Guided(ToyTask):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            is_first = batch["labels"] == VOCAB // 2
            total = model(batch["input_ids"], batch["scale"]).square().sum(-1)[is_first].sum()
            return Loss(loss.total + 0.3 * total, loss.count, {"guided": (total, int(is_first.sum()))})

    whole, expected = gradients([11], task_class=Guided)
    result, found = gradients([1, 7, 3], task_class=Guided)
    assert result.loss == pytest.approx(whole.loss, rel=1e-12)
    assert result.parts["guided"] == pytest.approx(whole.parts["guided"], rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def test_the_norm_is_logged_before_clipping(tmp_path):
    train(ToyTask(), toy_config(tmp_path / "clipped", max_grad_norm=0.01, max_steps=1))
    train(ToyTask(), toy_config(tmp_path / "free", max_grad_norm=None, max_steps=1))
    norms = [read_metrics(tmp_path / name / "metrics.jsonl")[0]["grad_norm"] for name in ("clipped", "free")]
    assert norms[0] == norms[1] > 0.01


@pytest.mark.parametrize("share", [0.3, 0.999, 1.0, 1.001, 4.0, float("inf")])
def test_clipping_gives_torchs_bits(share):
    torch.manual_seed(2)
    gradients = [torch.randn(13, 7), torch.randn(11), torch.randn(3, 5)]
    bound = share * torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    ours, torchs = ([torch.nn.Parameter(torch.zeros(gradient.shape)) for gradient in gradients] for _ in range(2))
    for parameters in (ours, torchs):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
    unused = torch.nn.Parameter(torch.zeros(2))
    norm = clip_whole_gradients([*ours, unused], bound)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_([*torchs, unused], bound))
    versions = [parameter.grad._version for parameter in ours]
    for one, other in zip(ours, torchs, strict=True):
        assert torch.equal(one.grad, other.grad)
    assert (max(versions) == 0) == (share > 1.0)  # left alone


def test_a_count_that_disagrees_is_refused(tmp_path):
    class Wrong(ToyTask):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            return Loss(loss.total, loss.count + 1)

    with pytest.raises(UsageError, match=r"Wrong\.loss scored \d+ tokens where count\(batch\) said \d+"):
        train(Wrong(), toy_config(tmp_path))


def test_weights_for_counts_and_losses_that_are_not_summed_are_refused(tmp_path):
    class Weighted(ToyTask):
        def count(self, batch):
            return super().count(batch) * 0.3

    class Unsummed(ToyTask):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            return Loss(loss.total[None], loss.count)

    with pytest.raises(UsageError, match=r"Weighted\.count gave \d+\.\d+, which is no number of tokens"):
        train(Weighted(), toy_config(tmp_path / "a"))
    with pytest.raises(UsageError, match=r"Unsummed\.loss gave a total of shape \(1,\): it has to be one number"):
        train(Unsummed(), toy_config(tmp_path / "b"))


def test_dropout_is_a_function_of_seed_step_and_process():
    def draw(*place, **options):
        seed_draws(*place, torch.device("cpu"), **options)
        return torch.rand(3).tolist()

    places = [draw(0, 1, 0), draw(0, 2, 0), draw(1, 1, 0), draw(0, 1, 1), draw(0, 1, 0, is_evaluation=True)]
    assert len({tuple(place) for place in places}) == len(places)
    assert draw(0, 1, 0) == places[0]


def test_buffers_of_a_skipped_step_come_back():
    norm = torch.nn.BatchNorm1d(3)
    guard = BufferGuard(dict(norm.named_buffers()))
    norm(torch.randn(5, 3))
    guard.keep()
    good = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm(torch.full((5, 3), float("nan")))
    guard.put_back()
    assert all(torch.equal(buffer, good[name]) for name, buffer in norm.named_buffers())


def test_buffers_that_cannot_be_written_to_are_left_alone():
    with torch.inference_mode():
        table = torch.arange(3.0)
    buffers = {"table": table, "expanded": torch.arange(3).expand(2, 3), "level": torch.zeros(())}
    guard = BufferGuard(buffers)
    assert not guard.are_written()
    buffers["level"].fill_(torch.nan)
    assert guard.are_written()
    guard.put_back()
    assert buffers["level"] == 0
