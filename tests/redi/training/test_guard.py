"""The collapse guard: fires on runs that lose what the model knew, is silent on healthy ones."""

import json
import random

import pytest
import tiny

from redi.errors import RediError
from redi.training import checkpoint
from redi.training.guard import SIGNS, CollapseGuard
from redi.training.logging import read_metrics
from redi.training.loop import train


def first_alarm(rows) -> int | None:
    guard = CollapseGuard()
    return next((step for step, row in enumerate(rows, 1) if guard.watch(row)), None)


def drifting(key, fall, *, steps=100, spread=0.0, start=-0.4, odd=()):
    """A metric that is `fall` lower at the end than at the start, with noise and odd steps."""
    draw = random.Random(0)
    values = [start - fall * i / steps + draw.gauss(0, spread) for i in range(steps)]
    return [{key: value - 5 * (i in odd)} for i, value in enumerate(values)]


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.key)
def test_each_sign_has_its_limit(sign):
    fall = -sign.worse * sign.limit
    assert first_alarm(drifting(sign.key, 0.9 * fall)) is None
    assert first_alarm(drifting(sign.key, -3 * fall)) is None  # the good direction
    assert 60 < first_alarm(drifting(sign.key, 1.5 * fall)) < 100


def test_batches_that_differ_are_no_collapse():
    """Ten times the demo's noise (steps of one or two traces), and odd steps far outside it."""
    assert first_alarm(drifting("logps/chosen", 0.15, steps=3000, spread=0.3)) is None
    assert first_alarm(drifting("logps/chosen", 0, odd=(30, 31, 50, 52, 54))) is None
    assert first_alarm(drifting("logps/chosen", 2, spread=1.0)) is not None


def test_a_fall_after_a_rise_counts_from_the_top():
    learns = drifting("logps/chosen", -3, start=-3.3)
    assert first_alarm(learns + drifting("logps/chosen", 1, start=-0.3)) > 150


def test_history_is_json_and_continues():
    rows = drifting("logps/stop", 3, spread=0.1)
    guard = CollapseGuard()
    for row in rows[:30]:
        assert not guard.watch(row)
    resumed = CollapseGuard()
    resumed.history = json.loads(json.dumps(guard.history))
    later = next(i for i, row in enumerate(rows[30:], 31) if resumed.watch(row))
    assert later == first_alarm(rows)
    assert "ends a chosen trace was -0.53 and is -2" in resumed.verdict()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A tiny model that has learned the chosen traces."""
    folder = tmp_path_factory.mktemp("learned")
    settings = {"objective": "sft", "learning_rate": 1e-2, "num_train_epochs": 30}
    return train(tiny.train_settings(folder, save_steps=100, train_batch_size=4, **settings))


def stage_2(learned, folder, **changes):
    changes = {"max_steps": 50, "save_steps": 100, "max_tokens_per_batch": 512} | changes
    settings = tiny.train_settings(folder, model_name_or_path=str(learned.output_dir), **changes)
    del settings["architecture"], settings["tokenizer_name_or_path"]
    return settings


@pytest.mark.parametrize("changes", [{"alpha": 0.8}, {"alpha": 0.5}, {"objective": "sft"}])
def test_silent_on_healthy_runs(learned, tmp_path, capsys, changes):
    train(stage_2(learned, tmp_path, learning_rate=3e-5, collapse_guard="stop", **changes))
    assert "WARNING" not in capsys.readouterr().err
    assert all("alarms" not in row for row in read_metrics(tmp_path / "out" / "metrics.jsonl"))


def test_collapse_warns_or_stops(learned, tmp_path, capsys):
    """alpha = 1 at a high rate. Stopped, the run has a checkpoint; it goes on only when told to."""
    settings = stage_2(learned, tmp_path, alpha=1.0, learning_rate=3e-3, collapse_guard="stop")
    with pytest.raises(RediError, match=r"a chosen trace was -0\.\d+ and is -\d") as stopped:
        train(settings)
    step = read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {step} of 50, checkpoint saved" in str(stopped.value)
    assert step < 50
    assert list(checkpoint.checkpoints(tmp_path / "out")) == [step]
    with pytest.raises(RediError, match=f"stopped after step {step} of 50"):
        train(settings)
    capsys.readouterr()
    assert train(settings | {"collapse_guard": "warn"}).steps == 50
    alone = stage_2(learned, tmp_path / "alone", alpha=1.0, learning_rate=3e-3)
    train(alone)
    assert f"WARNING: step {step}: the model is losing" in capsys.readouterr().err
    assert "alarms" in read_metrics(tmp_path / "alone" / "out" / "metrics.jsonl")[step - 1]
