"""What a run shows while it goes: vitals, held-out loss, meter, trackers, the screen."""

import io
import math
import re
import sys
import time
import types
from dataclasses import replace
from typing import ClassVar

import pytest
import tiny
import torch
from redi_kernels.logprobs import Fast

import redi
import redi.training.loop as train_module
from redi.config import TrainConfig
from redi.data.pack import pack_traces
from redi.data.tokenize import Trace
from redi.errors import RediError
from redi.training import logging as monitor
from redi.training.logging import TrainState, read_metrics
from redi.training.loop import train
from redi.training.metrics import NUM_SUMS, PROBE_TRACES, entropy_sums, pack_sums, step_means
from redi.training.model import PackedLM
from redi.training.objectives import PackLoss, StepCounts
from redi.training.plan import describe
from redi.training.terminal import Screen
from redi.training.throughput import Meter, idle_weights, model_flops, peak_flops


def make_traces(lengths, prompt=3):
    draw = torch.Generator().manual_seed(0)
    return [
        Trace(torch.randint(96, (n,), generator=draw).int().numpy(), prompt, i % 2 == 0, i // 2)
        for i, n in enumerate(lengths)
    ]


def test_a_chosen_trace_that_cannot_be_spoils_no_other_figure():
    """Its log-prob is -inf, and so is its reward; the rejected ones' stay numbers."""
    traces = make_traces([9, 14, 6, 11])
    (pack,) = pack_traces(traces, 40)
    logp_T = torch.zeros(40)
    rewards_S = torch.tensor([-torch.inf, -2.0, -1.0, -3.0])
    out = PackLoss(torch.tensor(1.0), rewards_S, torch.ones(4).long(), logp_T, rewards_S)
    sums = pack_sums(pack, out).tolist()
    means = step_means(sums, StepCounts.of(traces), rewards=True)
    assert means["rewards/chosen"] == means["rewards/margins"] == -math.inf
    assert means["rewards/rejected"] == -2.5 and means["rewards/accuracies"] == 0.5


@pytest.fixture(scope="module")
def lm():
    return tiny.make_lm("llama")


def test_vitals_are_those_of_each_trace(lm):
    """Two packs of two traces each; the packs are not told which token is whose."""
    traces = make_traces([9, 14, 6, 11])
    draw = torch.Generator().manual_seed(1)
    logps = [-12 * torch.rand(len(t.input_ids) - 3, generator=draw) for t in traces]
    chosen, rejected = logps[0::2], logps[1::2]
    sums = torch.zeros(NUM_SUMS)
    for pack in pack_traces(traces, 24):
        inside = [logp for logp in logps if len(logp) + 3 in pack.seqlens]  # in the same order
        assert len(inside) == 2
        logp_T = torch.cat([torch.nn.functional.pad(logp, (2, 1)) for logp in inside])
        logps_S, lengths_S = torch.stack([z.sum() for z in inside]), torch.tensor(pack.seqlens) - 3
        sums += pack_sums(pack, PackLoss(torch.tensor(1.0), logps_S, lengths_S, logp_T))
    means = step_means(sums.tolist(), StepCounts.of(traces))
    mean = lambda values: torch.stack(list(values)).mean().item()
    assert means["loss"] == 2
    assert means["logps/chosen"] == pytest.approx(mean(z.mean() for z in chosen))
    assert means["logps/rejected"] == pytest.approx(mean(z.mean() for z in rejected))
    assert means["logps/stop"] == pytest.approx(mean(z[-1] for z in chosen))
    faint = (torch.cat(rejected) < math.log(1e-4)).float().mean().item()
    assert 0.1 < faint < 0.4
    assert means["rejected_below_1e-4"] == pytest.approx(faint)


def test_entropy_is_that_of_the_full_distribution(lm):
    traces = make_traces([9, 14, 6, 11, 8, 5])
    entropies = []
    for trace in [t for t in traces if t.is_chosen][:PROBE_TRACES]:
        ids = torch.tensor(trace.input_ids)[None].long()
        with torch.no_grad():
            logp_TV = lm(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
        entropies.append(-(logp_TV.exp() * logp_TV).sum(-1))
    model = PackedLM(tiny.make_lm("llama"))
    total, count = entropy_sums(model, traces, 0, 1).tolist()
    assert total / count == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    shares = [entropy_sums(model, traces, rank, 4) for rank in range(4)]  # the last has none
    assert [int(n) for _, n in shares] == [6, 3, 5, 0]


def test_held_out_loss_is_the_training_loss_of_the_same_data(tmp_path):
    """Evaluated on what it trains on, before weights move: the step's own figures."""
    seen = []

    class Listen(redi.Callback):
        def on_evaluate(self, state, metrics):
            seen.append((state.step, metrics["eval_loss"]))

    settings = tiny.train_settings(
        tmp_path, train_batch_size=12, learning_rate=1e-12, num_train_epochs=5, eval_steps=2,
        logging_steps=3, eval_dataset_name=str(tmp_path / "pairs.jsonl"),
    )  # fmt: skip
    result = train(settings, [Listen()])
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 3, 4, 5]  # logged where evaluated, too
    assert [step for step, _ in seen] == [2, 4, 5]
    for key in ("loss", "logps/chosen", "logps/rejected", "logps/stop"):
        assert result.metrics[f"eval_{key}"] == pytest.approx(result.metrics[key], rel=1e-4)
    assert "eval_loss" not in rows[1]


def test_held_out_data_must_exist(tmp_path):
    with pytest.raises(RediError, match=r"nowhere\.jsonl"):
        train(tiny.train_settings(tmp_path, eval_dataset_name="nowhere.jsonl"))


def test_meter_splits_the_time(tmp_path):
    train(tiny.train_settings(tmp_path, logging_steps=3))
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6]
    parts = {key for key in rows[1] if key.startswith("time/")}
    names = ("data", "forward", "loss", "backward", "optimizer", "save", "eval")
    assert parts == {f"time/{name}" for name in names} - {"time/eval"}  # no entropy in steps 4 to 6
    assert "time/eval" in rows[0]
    wall = (rows[1]["time"] - rows[0]["time"]) / 3
    assert 0.7 * wall < sum(rows[1][part] for part in parts) < 1.05 * wall
    assert rows[1]["memory/peak_gib"] > 0.1


def test_flops_of_a_model(lm):
    """Against torch's counter on the forward's matmuls; attention by hand (causal: half)."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(1, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(input_ids=ids)
    full = counter.get_total_flops()
    attention = 3 * 4 * 40 * 40 * 32  # layers x (QK and PV: 2 T T width each), as eager does it
    assert model_flops(lm, [40]) == 3 * (full - attention / 2)
    assert model_flops(lm, [20, 20]) == 3 * (full - attention * 3 / 4)
    # Of the experts, those that a token is sent to.
    sizes = {"num_experts_per_tok": 2, "tie_word_embeddings": True, "pad_token_id": 0}
    few, many = (tiny.make_lm("mixtral", num_local_experts=n, **sizes) for n in (2, 8))
    routers = 6 * 3 * 6 * 32 * 40  # 6 more columns of each of 3 routers
    assert model_flops(many, [40]) == model_flops(few, [40]) + routers
    windowed = tiny.make_lm("mistral", tie_word_embeddings=True)
    windowed.config.layer_types = ["sliding_attention"] * 3
    kept = 40 * 40 / 2 - 34 * 34 / 2  # of the scores, with a window of 6
    assert model_flops(windowed, [40]) == 3 * (full - attention + attention * kept / 1600)


def test_known_gpus():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("Tesla T4") is None


def test_meter_reads_only_events_that_have_passed(monkeypatch):
    """On CUDA nothing waits: what the device has not reached counts in a later row."""

    class Event:
        made: ClassVar[list] = []

        def __init__(self, **_):
            Event.made.append(self)
            self.at = len(Event.made)

        record = lambda self: None
        query = lambda self: self.at <= Event.passed
        elapsed_time = lambda self, end: 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    resets = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    clock = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter(torch.device("cuda"), world_size=2)
    meter.start()
    meter.mark("forward")
    meter.mark("backward")
    Event.passed = 3
    assert meter.row() == {"time/forward": 1, "memory/peak_gib": 3}
    meter.start()
    Event.passed = 4
    assert meter.row() == {"time/backward": 1, "memory/peak_gib": 3}
    assert len(resets) == 2
    clock[0] += 9
    meter.start()
    clock[0] += 2
    lm = tiny.make_lm("llama")
    mfu = model_flops(lm, [64, 64]) / (2 * 2 * 989e12)
    assert meter.speed(lm, [64, 64]) == {"num_tokens": 128, "tokens_per_second": 64, "mfu": mfu}


def test_meter_counts_all_that_is_inside_as_that(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = Meter(torch.device("cpu"))
    meter.start()
    for clock[0], part in ((1.0, "forward"), (3.0, "loss")):
        meter.mark(part)
    clock[0] = 10.0  # callbacks: nobody's
    with meter.only("eval"):
        clock[0] = 12.0
        meter.mark("forward")
        clock[0] = 13.0
    clock[0] = 14.0
    meter.mark("backward")
    row = meter.row()
    del row["memory/peak_gib"]
    assert row == {"time/forward": 1, "time/loss": 2, "time/eval": 3, "time/backward": 1}


class Recorder(types.ModuleType):
    """Stands for wandb or trackio."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackers_get_every_row(tmp_path, monkeypatch, name):
    module = Recorder(name)
    monkeypatch.setitem(sys.modules, name, module)
    train(tiny.train_settings(tmp_path, report_to=name, max_steps=2))
    (begin, _, init), *logs, (end, _, _) = module.calls
    assert (begin, end) == ("init", "finish")
    assert init["config"]["alpha"] == 0.8
    assert init["name"].startswith("train-")
    assert init.get("id", init["name"]) == init["name"]
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [call[2]["step"] for call in logs] == [row.pop("step") for row in rows]
    assert [call[1][0] for call in logs] == rows


def test_tensorboard_hides_what_was_logged_after_the_saved_step(tmp_path, monkeypatch):
    class Writer:
        made: ClassVar[list] = []

        def __init__(self, folder, purge_step):
            Writer.made.append((folder, purge_step))
            self.scalars = []

        def add_scalar(self, key, value, step):
            self.scalars.append((key, step))

        def close(self):
            Writer.made.append(self.scalars)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(tiny.train_settings(tmp_path, report_to="tensorboard", max_steps=2))
    (folder, purge), scalars = Writer.made
    assert (folder, purge) == (str(tmp_path / "out" / "tensorboard"), 1)
    assert ("logps/chosen", 2) in scalars


def test_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(RediError, match="report_to: trackio is not installed: pip install trackio"):
        train(tiny.train_settings(tmp_path, report_to="trackio"))


class Terminal(io.StringIO):
    isatty = lambda self: True


def test_screen_shows_the_run():
    """On a terminal: log-probs, speed, where the time goes, held-out figures."""
    screen, state = Screen(Terminal()), TrainState(total_steps=10, name="redi")
    logs = {"loss": 0.1234, "logps/chosen": -0.4, "logps/rejected": -0.6, "tokens_per_second": 5000}
    logs |= {"mfu": 0.41, "memory/peak_gib": 61.5, "time/forward": 1.0, "time/backward": 3.0}
    screen.on_train_begin(state)
    for state.step in (1, 2):
        screen.on_log(state, logs | ({"eval_loss": 0.777} if state.step == 1 else {}))
    screen.on_train_end(state)
    text = re.sub(r"\x1b\[[\d;?]*\w", "", screen.stream.getvalue())
    for words in ("redi", "2/10", "0.1234", "-0.400", "5,000", "41%", "61.5", "backward 75%"):
        assert words in text
    assert "0.777" in text.rsplit("2/10")[-1]  # held-out figures stay until the next ones


def test_without_a_terminal_a_line_now_and_then():
    """The first, the last, and what is left is judged by the steps since the resume."""
    screen, state = Screen(io.StringIO(), every=1000), TrainState(step=4, total_steps=7)
    screen.on_train_begin(state)
    screen.started -= 10
    for state.step in (5, 6, 7):
        screen.on_log(state, {"loss": 0.5})
    lines = screen.stream.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["5/7", "7/7"]
    assert lines[0].endswith("loss 0.5000  ETA 0:20")


def test_ticker_tells_the_time_left_at_the_pace_since_its_first_call(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    tick = monitor.ticker("rows", every=10)
    for clock[0], count, share in ((150.0, 5000, 0.5), (155.0, 5100, 0.51), (170.0, 6000, 0.6)):
        tick(count, share)
    assert capsys.readouterr().err == "rows  5,000  50%\nrows  6,000  60%  0:01:20 left\n"
    tick(6500)
    clock[0] = 180.0
    tick(7000)
    assert capsys.readouterr().err == "rows  7,000\n"


def test_fast_figures_are_means_over_a_steps_tokens(tmp_path, monkeypatch):
    """Whatever the packs: of tokens of which each lost a tenth of its log-prob's size."""
    make, told = train_module.make_objective, []

    def telling(config):
        def objective(counts, x_TH, w_VH, pack, options):
            out = make(config)(counts, x_TH, w_VH, pack, options)
            share = out.logp_T.new_tensor(pack.num_targets / 1000)
            told.append((pack.num_targets, float(-out.logp_T.sum())))
            fast = Fast(dropped_T=-out.logp_T / 10, active=share, error=2 * share)
            return replace(out, fast=fast)

        return objective

    monkeypatch.setattr(train_module, "make_objective", telling)
    train(tiny.train_settings(tmp_path, loss_tolerance=2.0, max_steps=1))
    (row,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert len({number for number, _ in told}) > 1
    total = sum(number for number, _ in told)
    active = sum(number * number / 1000 for number, _ in told) / total
    assert row["fast/dropped"] == pytest.approx(sum(lost for _, lost in told) / 10 / total)
    assert (row["fast/active"], row["fast/error"]) == pytest.approx((active, 2 * active))


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "pad_token_id": 0}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16}),
    ],
)
def test_experts_that_a_token_is_not_sent_to_cost_nothing(family, experts, tmp_path):
    """In MFU, and in what a plan says of the hours: three of four here."""
    lm = tiny.make_lm(family, **experts)
    in_experts = sum(p.numel() for n, p in lm.named_parameters() if ".experts." in n)
    assert in_experts > 0 and idle_weights(lm) == in_experts * 3 / 4
    whole = tiny.make_lm(family, **{**experts, "num_experts_per_tok": 4})
    assert idle_weights(whole) == 0
    assert model_flops(whole, [7]) - model_flops(lm, [7]) == 6 * 7 * in_experts * 3 / 4
    architecture = tiny.architecture(family, **experts)
    text = describe(TrainConfig(**tiny.train_settings(tmp_path, architecture=architecture)), gpus=0)
    total = sum(p.numel() for p in lm.parameters())
    assert f"{total:,} parameters, {total - in_experts * 3 // 4:,} active" in text
