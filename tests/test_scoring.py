"""Figures of validation: what they are, whatever the run trains with."""

import gc
import json
import math

import pytest
import torch

import evaluate
import train
from images.batches import Batch
from training import scoring


def test_loss_is_the_cross_entropy_of_the_labels_by_hand():
    logits_BY = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 0.0], [9.0, 9.0, 9.0]])
    label_B = torch.tensor([0, 2, scoring.NOT_COUNTED])
    figures = scoring.figures(scoring._sums(logits_BY, label_B))
    first = math.log(sum(math.exp(z) for z in (2.0, -1.0, 0.5))) - 2.0
    second = math.log(2 + math.e)
    expected = {"val_images": 2, "val_loss": (first + second) / 2, "top1": 50, "top5": 100}
    assert figures == pytest.approx(expected)


class Fixed(torch.nn.Module):
    """Gives every image the same logits, whose number of classes no other tensor here has."""

    def __init__(self, num_classes):
        super().__init__()
        self.logits_Y = torch.linspace(0, 1, num_classes)

    def forward(self, image_BCHW):
        return self.logits_Y.expand(len(image_BCHW), -1)


def score_and_count(world, num_batches, num_classes):
    label_B = torch.tensor([0, 1, scoring.NOT_COUNTED])
    batch = Batch(torch.zeros(3, 3, 2, 2), label_B, torch.arange(3))
    alive = []

    def after_batch():
        gc.collect()
        tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
        alive.append(sum(found.numel() for found in tensors if num_classes in found.shape))

    sums_Y4 = scoring.score(
        Fixed(num_classes),
        [batch] * num_batches,
        device=world.device,
        dtype=torch.float32,
        after_batch=after_batch,
    )
    return alive, sums_Y4


def test_memory_of_validation_does_not_grow_with_its_batches(ranks):
    num_batches, num_classes = 20, 503
    ((alive, sums_Y4),) = ranks(1, score_and_count, num_batches, num_classes)
    assert len(alive) == num_batches
    assert alive[-1] == alive[1] > 0
    partition = torch.linspace(0, 1, num_classes).double().exp().sum().log().item()
    worst_two = [[20, 20 * (partition - z), 0, 0] for z in (0, 1 / (num_classes - 1))]
    torch.testing.assert_close(sums_Y4[:2], torch.tensor(worst_two).double(), rtol=1e-6, atol=0)
    assert sums_Y4[2:].count_nonzero() == 0


def test_a_run_with_another_loss_reports_cross_entropy_and_calls_it_so(ranks, small_run, tmp_path):
    """At its first update a network knows nothing: log 3 of 3 classes, not BCE's log 2."""
    config = small_run(
        "training.steps=1",
        "training.loss=bce",
        "training.label_smoothing=0",
        "optimizer.lr=1e-9",
        "optimizer.min_lr=0",
    )

    def trained(world):
        shown = []
        train.as_table = lambda _title, rows: shown.append(dict(rows)) or []
        train.train(config, world)
        return shown[0]

    (rows,) = ranks(1, trained)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    figures = {line["event"]: line for line in lines}
    assert figures["train"]["loss"] == pytest.approx(math.log(2), rel=0.05)
    assert figures["val"]["val_loss"] == pytest.approx(math.log(3), rel=0.05)
    assert float(rows["validation cross-entropy"]) == pytest.approx(math.log(3), rel=0.05)
    assert not [name for name in rows if "loss" in name]


def test_scores_are_printed_as_cross_entropy(capsys):
    one = {"images": 7.0, "loss": 1.2345, "top1": 50.0, "top5": 100.0}
    scores = {"val_images": 7.0, "val_loss": 1.2345, "top1": 50.0, "top5": 100.0}
    evaluate.print_scores(scores | {"classes": {"n01": one}}, origin="x", per_class=True)
    printed = capsys.readouterr().out
    assert printed.count("cross-entropy") == 2
    assert "loss" not in printed


@pytest.mark.parametrize(
    ("hits", "count", "num_classes", "is_guessing"),
    [
        (50, 50_000, 1000, True),
        (71, 50_000, 1000, True),  # 50 + 3 * 7.07
        (72, 50_000, 1000, False),
        (0, 50_000, 1000, True),
        (40_000, 50_000, 1000, False),
        (100, 100, 1, True),
    ],
)
def test_guessing_is_within_three_deviations(hits, count, num_classes, is_guessing):
    figures = {"val_images": count, "top1": 100 * hits / count}
    assert scoring.is_guessing(figures, num_classes=num_classes) == is_guessing
