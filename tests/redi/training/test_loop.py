"""The loop: what it writes, that it continues exactly, and what it refuses."""

import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from poison import poisoned
from redi_kernels import fast_plan
from safetensors.torch import load_file

import redi
import redi.training.loop as train_module
from redi.config import TrainConfig
from redi.errors import Interrupted, RediError
from redi.files import claim
from redi.recipe import make_config
from redi.training import checkpoint, faults
from redi.training.logging import read_metrics, timeless
from redi.training.loop import train
from redi.training.model import PackedLM
from redi.training.schedule import Schedule


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same_bits(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def metrics(folder: Path) -> list[dict]:
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return [timeless(row) for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One uninterrupted run of 6 steps (12 pairs, 5 a step, 2 epochs)."""
    folder = tmp_path_factory.mktemp("straight")
    result = train(tiny.train_settings(folder))
    return folder, result


class StopAt(redi.Callback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, state):
        if state.step == self.step:
            raise self.error


def test_result_and_metrics(straight):
    folder, result = straight
    rows = metrics(folder / "out")
    assert result.steps == 6
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows][-1] == 2
    assert rows[0]["loss"] == pytest.approx(
        -rows[0]["logps/chosen"] + 0.8 * rows[0]["logps/rejected"], abs=1e-5
    )
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_model_folder_is_an_ordinary_one(straight):
    """Plain transformers loads it, finds the template, and stops where training stopped."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = straight[0] / "out"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<e>")]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2=?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    card = (folder / "README.md").read_text()
    assert "alpha: 0.8" in card
    assert "2505.24850" in card
    recipe = card.split("```yaml\n")[1].split("```")[0]
    make_config(TrainConfig, yaml.safe_load(recipe), "the card")  # it can be run again


def test_same_seed_same_bits(straight, tmp_path):
    train(tiny.train_settings(tmp_path))
    assert same_bits(straight[0] / "out", tmp_path / "out")


def test_another_seed_is_another_model(straight, tmp_path):
    train(tiny.train_settings(tmp_path, seed=2))
    assert not same_bits(straight[0] / "out", tmp_path / "out")


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resume_is_bit_for_bit(straight, tmp_path, stop):
    """A crash after `stop` steps loses at most the steps since the last save, and nothing else."""
    settings = tiny.train_settings(tmp_path)
    with pytest.raises(ZeroDivisionError):
        train(settings, [StopAt(stop, ZeroDivisionError())])
    assert not (tmp_path / "out" / "config.json").exists()
    train(settings)
    assert same_bits(straight[0] / "out", tmp_path / "out")
    assert metrics(tmp_path / "out") == metrics(straight[0] / "out")


def test_finished_run_is_not_run_again(straight):
    folder, result = straight

    again = train(tiny.train_settings(folder), [StopAt(1, AssertionError("trained again"))])
    assert again == result


def test_output_dir_of_another_run_is_refused(straight):
    folder, _ = straight
    with pytest.raises(RediError, match=r"differs in alpha \(0.8 there, 0.5 now\)"):
        train(tiny.train_settings(folder, alpha=0.5))


def test_checkpoint_of_other_data_is_refused(tmp_path):
    settings = tiny.train_settings(tmp_path)
    with pytest.raises(ZeroDivisionError):
        train(settings, [StopAt(3, ZeroDivisionError())])
    tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.pair_rows()[::-1])
    with pytest.raises(RediError, match="differs in the data"):
        train(settings)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, straight, capsys):
    settings = tiny.train_settings(tmp_path, save_total_limit=3)
    with pytest.raises(ZeroDivisionError):
        train(settings, [StopAt(5, ZeroDivisionError())])
    out = tmp_path / "out"
    assert list(checkpoint.checkpoints(out)) == [2, 4]
    damaged = out / "checkpoint-4" / "optimizer-00001-of-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    train(settings)
    err = capsys.readouterr().err
    assert "not continuing from a damaged checkpoint" in err
    assert "checkpoint-4: optimizer-00001-of-00001.safetensors has" in err
    assert "continuing after step 2" in err
    assert same_bits(straight[0] / "out", out)
    assert metrics(out) == metrics(straight[0] / "out")


def test_old_checkpoints_go(straight):
    left = sorted(p.name for p in (straight[0] / "out").glob("checkpoint-*"))
    assert left == ["checkpoint-4", "checkpoint-6"]


class Signal(redi.Callback):
    def __init__(self, step, *signals):
        self.step, self.signals = step, signals

    def on_step_end(self, state):
        for number in self.signals if state.step == self.step else ():
            os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "signals", [[signal.SIGTERM], [signal.SIGTERM] * 2, [signal.SIGINT] * 2], ids=len
)
def test_signal_saves_and_continues_exactly(straight, tmp_path, capsys, signals):
    """Two of them too: a scheduler tells every process, and then the launcher tells its ranks; a
    launcher passes on a Ctrl-C that its ranks have got already."""
    settings = tiny.train_settings(tmp_path, save_steps=100)
    before = signal.getsignal(signals[0])
    said = "stopped after step 3 of 6, checkpoint saved; run the same command to continue"
    with pytest.raises(Interrupted, match=said):
        train(settings, [Signal(3, *signals)])
    assert capsys.readouterr().err.count("stopping after this step (Ctrl-C again to") == 1
    assert signal.getsignal(signals[0]) == before
    train(settings, [Signal(6, *signals)])  # nothing is left to stop
    assert same_bits(straight[0] / "out", tmp_path / "out")
    assert metrics(tmp_path / "out") == metrics(straight[0] / "out")


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    class CtrlC(redi.Callback):
        def on_step_end(self, state):
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(faults, "AGAIN", 0.0)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny.train_settings(tmp_path), [CtrlC()])
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_sigkill_of_the_command_line(straight, tmp_path):
    """The real program, killed outright at a random-looking moment, then run again."""
    import yaml

    settings = tiny.train_settings(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "redi", "train", "--config", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    file = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(file)) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert same_bits(straight[0] / "out", tmp_path / "out")
    assert metrics(tmp_path / "out") == metrics(straight[0] / "out")


def steps_with(settings, example):
    schedule = Schedule(12, make_config(TrainConfig, settings, "test"))
    return [s + 1 for s in range(schedule.total_steps) if example in schedule.examples(s)]


def test_nan_stops_before_the_weights_change(tmp_path, monkeypatch):
    settings = tiny.train_settings(tmp_path, save_steps=1)
    monkeypatch.setattr(train_module, "make_objective", poisoned(7))
    step = steps_with(settings, 7)[0]
    with pytest.raises(RediError, match=rf"step {step}: loss nan, .*sum-7.*step-{step}.json"):
        train(settings)
    out = tmp_path / "out"
    assert not (out / "config.json").exists()
    assert list(checkpoint.checkpoints(out)) == [s for s in (step - 2, step - 1) if s > 0]
    saved = json.loads((out / "nonfinite" / f"step-{step}.json").read_text())
    assert saved["loss"] == "nan"
    assert len(saved["examples"]) in (2, 5)
    bad = next(example for example in saved["examples"] if example["id"] == "sum-7")
    text = tiny.make_tokenizer().decode(bad["traces"][0]["input_ids"])
    assert text == "<q>22+5=?<a>so so so 22+5=27<e>"
    assert [trace["is_chosen"] for trace in bad["traces"]] == [True, False]


def test_nan_steps_are_skipped_counted_and_shown(tmp_path, monkeypatch, capsys):
    settings = tiny.train_settings(tmp_path, nonfinite="skip", save_steps=1)
    monkeypatch.setattr(train_module, "make_objective", poisoned(7))
    steps = steps_with(settings, 7)
    assert len(steps) == 2
    result = train(settings)
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "loss" not in row] == steps
    counts = [sum(s <= row["step"] for s in steps) for row in rows]
    assert [row.get("skipped_steps", 0) for row in rows] == counts
    said = [json.loads(line) for line in (Path(settings["output_dir"]) / "metrics.jsonl").open()]
    skipped = [row["step"] for row in said if row.get("skipped")]
    assert skipped == [row["step"] for row in said if row["loss"] is None]
    assert len(skipped) == counts[-1]
    assert all(t.isfinite().all() for t in weights(result.output_dir).values())
    err = capsys.readouterr().err
    assert all(f"WARNING: skipped step {step}: loss nan" in err for step in steps)
    assert "skipped 2  ETA" in err  # the last line of progress

    again = tiny.train_settings(tmp_path / "again", nonfinite="skip", save_steps=1)
    with pytest.raises(ZeroDivisionError):
        train(again, [StopAt(steps[0] + 1, ZeroDivisionError())])  # the skip is saved
    train(again)
    assert same_bits(tmp_path / "out", tmp_path / "again" / "out")
    assert metrics(tmp_path / "again" / "out") == rows


def test_skipping_ends_when_every_step_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "make_objective", poisoned(*range(12)))
    settings = tiny.train_settings(tmp_path, nonfinite="skip", num_train_epochs=9)
    with pytest.raises(RediError, match=r"step 10: .*it is: 10 steps in a row"):
        train(settings)


class FullDisk(redi.Callback):
    """A limit on file sizes stands in for the disk: real short writes, below Python too."""

    NONE = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit(self, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.NONE))


def test_full_disk_warns_and_goes_on(straight, tmp_path, capsys):
    class Full(FullDisk):
        def on_step_end(self, state):
            log = state.output_dir / "metrics.jsonl"
            if state.step in (1, 3):
                self.limit(log.stat().st_size + 10 if state.step == 1 else self.NONE)

        def on_save(self, state):
            assert state.step != 2

    try:
        train(tiny.train_settings(tmp_path), [Full()])
    finally:
        FullDisk().limit(FullDisk.NONE)
    err = capsys.readouterr().err
    assert "checkpoint-2 NOT saved: " in err
    assert "File too large" in err
    assert "metrics.jsonl: 2 lines not written yet" in err
    assert list(checkpoint.checkpoints(tmp_path / "out")) == [4, 6]
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert same_bits(straight[0] / "out", tmp_path / "out")
    assert metrics(tmp_path / "out") == metrics(straight[0] / "out")


def test_stopped_on_a_full_disk_says_what_was_saved(straight, tmp_path):
    """And a checkpoint of an older redi, which kept nothing for the guard, is continued."""

    class Full(FullDisk):
        def on_step_end(self, state):
            if state.step == 3:
                self.limit((state.output_dir / "metrics.jsonl").stat().st_size + 10)
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.raises(Interrupted, match=r"step 3 of 6, NOT saved \(the last save: 2\)"):
            train(tiny.train_settings(tmp_path), [Full()])
    finally:
        FullDisk().limit(FullDisk.NONE)
    folder = tmp_path / "out" / "checkpoint-2"
    state = json.loads((folder / checkpoint.STATE).read_text())
    del state["guard"]
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    marker = json.loads((folder / checkpoint.MARKER).read_text())
    marker[checkpoint.STATE] = checkpoint._record(folder / checkpoint.STATE)
    (folder / checkpoint.MARKER).write_text(json.dumps(marker))
    train(tiny.train_settings(tmp_path))
    assert same_bits(straight[0] / "out", tmp_path / "out")


def test_full_disk_at_the_end_keeps_the_checkpoint(straight, tmp_path):
    class Full(FullDisk):
        def on_save(self, state):
            if state.step == 6:
                self.limit(20_000)

    settings = tiny.train_settings(tmp_path)
    try:
        with pytest.raises(RediError, match=r"could not be written.*File too large.*continues"):
            train(settings, [Full()])
    finally:
        FullDisk().limit(FullDisk.NONE)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "export.tmp").exists()
    train(settings)
    assert same_bits(straight[0] / "out", tmp_path / "out")


def test_a_disk_that_was_always_full_says_that_nothing_is_kept(tmp_path, capsys):
    class Full(FullDisk):
        def on_step_end(self, state):
            if state.step == 1:
                self.limit(20_000)

    try:
        with pytest.raises(RediError, match=r"could not be written.*starts anew, since no checkpo"):
            train(tiny.train_settings(tmp_path), [Full()])
        with pytest.raises(
            Interrupted, match=r"NOT saved \(the last save: none\); nothing is saved"
        ):
            train(tiny.train_settings(tmp_path), [Full(), Signal(3, signal.SIGTERM)])
    finally:
        FullDisk().limit(FullDisk.NONE)
    assert "checkpoint-2 NOT saved: " in (err := capsys.readouterr().err)
    assert "the last save: none" in err


def test_small_rates_move_the_weights(tmp_path):
    """At lr 1e-6 weights kept in bf16 stay where they are; fp32 masters move under bf16 compute as
    they do under fp32."""
    constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    runs = {
        "start": {"max_steps": 1, "learning_rate": 1e-30},
        "fp32": {"max_steps": 4, "learning_rate": 1e-6},
        "bf16": {"max_steps": 4, "learning_rate": 1e-6, "bf16": True},
    }
    flat = {}
    for name, changes in runs.items():
        settings = tiny.train_settings(tmp_path, output_dir=str(tmp_path / name), **constant)
        made = weights(train(settings | changes).output_dir)
        assert {tensor.dtype for tensor in made.values()} == {torch.float32}
        flat[name] = torch.cat([made[k].flatten() for k in sorted(made) if made[k].ndim == 2])
    moves = {name: flat[name] - flat["start"] for name in ("fp32", "bf16")}
    moving = moves["fp32"] != 0
    assert moving.float().mean() > 0.8
    assert moves["fp32"][moving].abs().mean() > 1e-6
    assert moves["bf16"].abs().mean() == pytest.approx(moves["fp32"].abs().mean().item(), rel=0.02)
    cosine = torch.nn.functional.cosine_similarity(moves["bf16"], moves["fp32"], dim=0)
    assert cosine > 0.9
    kept = {name: flat[name].bfloat16() for name in flat}
    assert (kept["fp32"] != kept["start"]).float().mean() < 0.15


def test_training_draws_no_random_number(tmp_path):
    """Data order is a function of (seed, epoch) and dropout is off, so that a resumed run has no
    generator to restore, and ranks none to keep in step."""

    seen = []

    class States(redi.Callback):
        def on_train_begin(self, state):
            seen.append((random.getstate(), torch.get_rng_state(), np.random.get_state()[1:]))

        on_step_end = on_train_begin

    train(tiny.train_settings(tmp_path), [States()])
    (python, torchs, numpys), *later = seen
    assert len(later) == 6
    for now in later:
        assert now[0] == python
        assert torch.equal(now[1], torchs)
        assert np.array_equal(now[2][0], numpys[0]) and now[2][1:] == numpys[1:]


def test_gradients_keep_their_place_from_step_to_step(tmp_path):
    """Fresh ones would leave holes between the first pack's tensors; a NaN must not stay either."""
    places = []

    class Spy(redi.Callback):
        def on_step_end(self, state):
            parameters = list(state.model.parameters())
            places.append([p.grad.data_ptr() for p in parameters])
            for p in parameters:
                p.grad.fill_(torch.nan)

    config = tiny.train_settings(tmp_path, max_steps=3, max_tokens_per_batch=60)
    spied = train({**config, "output_dir": str(tmp_path / "spied")}, [Spy()])
    assert len(places) == 3
    assert places[0] == places[1] == places[2]
    alone = train({**config, "output_dir": str(tmp_path / "alone")})
    assert same_bits(spied.output_dir, alone.output_dir)


def test_exported_dtype(tmp_path):
    result = train(tiny.train_settings(tmp_path, dtype="bfloat16", max_steps=1))
    assert {t.dtype for t in weights(result.output_dir).values()} == {torch.bfloat16}
    assert json.loads((result.output_dir / "config.json").read_text())["dtype"] == "bfloat16"


def test_auto_keeps_the_dtype_that_a_model_came_in(tmp_path):
    """In config.json too, stage after stage."""
    settings = tiny.train_settings(tmp_path, dtype="bfloat16", max_steps=1)
    folder = train(settings).output_dir
    del settings["architecture"], settings["dtype"], settings["tokenizer_name_or_path"]
    for name in "ab":
        settings |= {"model_name_or_path": str(folder), "output_dir": str(tmp_path / name)}
        folder = train(settings).output_dir
        assert {t.dtype for t in weights(folder).values()} == {torch.bfloat16}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_two_stages(tmp_path):
    """SFT, then REDI from its folder; log-probs continue where SFT left them."""
    sft = train(
        tiny.train_settings(
            tmp_path, objective="sft", output_dir=str(tmp_path / "sft"), num_train_epochs=8
        )
    )
    settings = tiny.train_settings(
        tmp_path, model_name_or_path=str(sft.output_dir), train_batch_size=12
    )
    del settings["architecture"], settings["tokenizer_name_or_path"]
    train(settings)
    first = metrics(tmp_path / "out")[0]
    assert first["logps/chosen"] == pytest.approx(sft.metrics["logps/chosen"], abs=0.4)
    assert "logps/rejected" not in sft.metrics


def test_the_model_before_is_gone_when_the_next_one_is_loaded(tmp_path, monkeypatch):
    """`redi run` trains stage after stage; each would keep the last one's gigabytes. (Python's own
    collector comes round to them late, or, as here, not at all.)"""
    made, alive = [], []
    init = PackedLM.__init__

    def remembered(self, *args, **kwargs):
        alive.append(sum(reference() is not None for reference in made))
        made.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(PackedLM, "__init__", remembered)
    gc.disable()
    try:
        for name in "ab":
            train(tiny.train_settings(tmp_path, output_dir=str(tmp_path / name), max_steps=1))
    finally:
        gc.enable()
    assert alive == [0, 0]


def test_a_run_that_would_start_over_says_how_it_continues(tmp_path):
    settings = tiny.train_settings(tmp_path, resume_from_checkpoint=False)
    with pytest.raises(Interrupted, match="run it with resume_from_checkpoint: auto"):
        train(settings, [Signal(3, signal.SIGTERM)])


def test_two_runs_cannot_share_a_folder(tmp_path):
    settings = tiny.train_settings(tmp_path, max_steps=1)
    with claim(tmp_path / "out", "run"), pytest.raises(RediError, match="another run is at work"):
        train(settings)
    train(settings)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RediError, match=r"file.out: cannot be written"):
        train(tiny.train_settings(tmp_path, output_dir=str(tmp_path / "file" / "out")))


def test_a_trace_longer_than_the_models_positions_is_refused(tmp_path):
    architecture = tiny.architecture(max_position_embeddings=20)
    with pytest.raises(RediError, match=r"tokens in a trace, 20 positions in the model"):
        train(tiny.train_settings(tmp_path, architecture=architecture))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_what_fast_mode_leaves_out_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(fast_plan, "LEAST_TOKENS", 0)
    train(tiny.train_settings(tmp_path, loss_tolerance=2.0))
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert all(0 < row["fast/active"] <= 1 and row["fast/error"] >= 0 for row in rows)
    train(tiny.train_settings(tmp_path / "exact"))
    assert not any(
        "fast/active" in row for row in read_metrics(tmp_path / "exact/out/metrics.jsonl")
    )
