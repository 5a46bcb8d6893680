"""Which examples and which learning rate a step gets."""

import numpy as np
import pytest
import torch
import transformers

from redi.config import TrainConfig
from redi.recipe import make_config
from redi.training.schedule import Schedule


def plan(**changes) -> Schedule:
    content = {
        "model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "train_batch_size": 3,
        "num_train_epochs": 4, "learning_rate": 2.0, "warmup_ratio": 0.1,
    }  # fmt: skip
    return Schedule(13, make_config(TrainConfig, content | changes, "test"))


def test_steps_and_warm_up():
    schedule = plan()
    counts = (schedule.steps_per_epoch, schedule.total_steps, schedule.warmup_steps)
    assert counts == (5, 20, 2)
    rates = [schedule.learning_rate(s) for s in range(20)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert np.allclose(np.diff(rates[2:]), -2.0 / 18)
    assert rates[-1] == pytest.approx(2.0 / 18)
    assert plan(max_steps=7).total_steps == 7


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.3])
def test_rates_are_those_of_transformers(kind, warmup_ratio):
    """After the warm-up, step for step; in it, one step ahead: none is spent at a rate of 0."""
    schedule = plan(lr_scheduler_type=kind, warmup_ratio=warmup_ratio)
    warmup = schedule.warmup_steps
    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    theirs = transformers.get_scheduler(name, optimizer, warmup, schedule.total_steps)
    want = []
    for _ in range(schedule.total_steps):
        want.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    got = [schedule.learning_rate(s) for s in range(schedule.total_steps)]
    assert got[warmup:] == pytest.approx(want[warmup:])
    assert got[:warmup] == pytest.approx(want[1 : warmup + 1])


def test_each_epoch_visits_every_example_once_in_its_own_order():
    schedule = plan()
    orders = [[i for s in range(5) for i in schedule.examples(5 * e + s)] for e in range(4)]
    assert all(sorted(order) == list(range(13)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_order_is_a_function_of_seed_and_step():
    torch.manual_seed(9)
    np.random.seed(9)
    late = plan(seed=5).examples(17)  # asked out of turn, whatever was drawn before
    assert late == [plan(seed=5).examples(s) for s in range(18)][17]
    assert late != plan(seed=6).examples(17)
