"""One step's gradient, whatever its packing: against padded, one-at-a-time and textbook forms."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from redi_kernels import fast

from redi.config import TrainConfig
from redi.data.divergence import push_from_divergence
from redi.data.pack import IGNORE_INDEX, pack_step, pack_traces
from redi.data.tokenize import Trace
from redi.errors import RediError
from redi.recipe import make_config
from redi.training.loop import load_data
from redi.training.metrics import NUM_SUMS, pack_sums, step_means
from redi.training.model import load_model, load_tokenizer
from redi.training.objectives import (
    NEEDS_PAIRS,
    StepCounts,
    make_objective,
)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A tiny model and the traces of one step: 7 pairs of uneven length."""
    folder = tmp_path_factory.mktemp("step")
    config = make_config(TrainConfig, tiny.train_settings(folder), "test")
    model = load_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)  # logits far from uniform
    data = load_data(config, load_tokenizer(config))
    traces = [trace for example in data.traces[:7] for trace in example]
    refs = torch.linspace(-90, -20, len(traces)).tolist()  # any numbers will do
    return model, [replace(t, ref_logp=ref) for t, ref in zip(traces, refs, strict=True)]


# Bounded negatives: the settings, and what takes the place of a rejected trace's log-probs.
BOUNDS = {
    "unlikelihood": ({"rejected_loss": "unlikelihood"}, lambda lp: -(1 - lp.exp()).log()),
    "floor": ({"rejected_floor": -4.6}, lambda lp: torch.where(lp < -4.6, -4.6, lp)),
}


def recipe(objective="redi", alpha=0.8):
    """Of DPO, a beta that fits the sums of these short traces."""
    beta = {"dpo": 0.3, "simpo": 1.5}.get(objective)
    content = {
        "objective": "redi" if objective in BOUNDS else objective,
        "alpha": alpha, "beta": beta, "simpo_gamma": 0.7 if objective == "simpo" else 1.0,
        "model_name_or_path": "m", "dataset_name": "d", "output_dir": "o",
    } | BOUNDS.get(objective, ({},))[0]  # fmt: skip
    return make_config(TrainConfig, content, "test")


def gradient(model, traces, *, max_tokens, objective="redi", alpha=0.8, counts=None):
    """(loss, gradient, per-trace summed log-probs) of one step, packed under `max_tokens`."""
    counts = counts or StepCounts.of(traces)
    pairs = objective in NEEDS_PAIRS
    objective = make_objective(recipe(objective, alpha))
    model.zero_grad()
    loss, logps = 0.0, {}
    for pack in pack_step(traces, max_tokens, pairs=pairs):
        out = model(pack, partial(objective, counts))
        out.loss.backward()
        loss += out.loss.item()
        for example, chosen, logp in zip(pack.examples, pack.is_chosen_S, out.logps_S, strict=True):
            logps[example, bool(chosen)] = logp.item()
    return loss, flat_gradient(model), logps


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def padded_oracle(model, traces, alpha, objective="redi"):
    """The same step the ordinary way: right-padded batch, stock eager attention, full logits."""
    lm = model.lm
    longest = max(len(t.input_ids) for t in traces)
    ids_SL = torch.zeros(len(traces), longest, dtype=torch.long)
    for row, trace in zip(ids_SL, traces, strict=True):
        row[: len(trace.input_ids)] = torch.from_numpy(trace.input_ids).long()
    lm.set_attn_implementation("eager")
    model.zero_grad()
    logps_SLV = lm(input_ids=ids_SL, use_cache=False).logits.log_softmax(-1)
    chosen, rejected, tokens = [], [], []
    for i, trace in enumerate(traces):
        positions = torch.arange(trace.num_prompt_tokens, len(trace.input_ids))
        logp = logps_SLV[i, positions - 1, ids_SL[i, positions]]
        tokens.append(logp)
        if objective in BOUNDS and not trace.is_chosen:
            logp = BOUNDS[objective][1](logp)
        if trace.pushed and not trace.is_chosen:  # divided by the whole trace's length all the same
            start, end = (i - trace.num_prompt_tokens for i in trace.pushed)
            logp = torch.cat([0 * logp[:start], logp[start:end], 0 * logp[end:]])
        score = logp.sum() - trace.ref_logp if objective == "dpo" else logp.mean()
        (chosen if trace.is_chosen else rejected).append(score)
    if objective == "sft":
        loss = -torch.cat(tokens).mean()
    elif objective in NEEDS_PAIRS:
        beta, gamma = (0.3, 0) if objective == "dpo" else (1.5, 0.7)
        gaps = torch.stack(chosen) - torch.stack(rejected)
        loss = -(beta * gaps - gamma).sigmoid().log().mean()
    else:
        loss = -torch.stack(chosen).mean() + alpha * torch.stack(rejected).mean()
    loss.backward()
    lm.set_attn_implementation("redi_varlen")
    return loss.item(), flat_gradient(model)


def assert_same(gradient, truth, tolerance=2e-6):
    assert truth.norm() > 1e-3
    assert (gradient - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("objective", ["redi", "dpo", "simpo", *BOUNDS])
def test_any_packing_and_order_give_the_same_gradient(step, objective):
    """Down to every trace, or pair, alone, as with accumulation; uneven packs between."""
    model, traces = step
    whole, truth, _ = gradient(model, traces, max_tokens=10_000, objective=objective)
    for max_tokens in (1, 40, 64, 100):
        for order in (traces, traces[::-1]):
            loss, grad, _ = gradient(model, order, max_tokens=max_tokens, objective=objective)
            assert loss == pytest.approx(whole, abs=2e-6)
            assert_same(grad, truth)


def test_pairs_weigh_the_same_in_uneven_packs(step):
    """ms-swift#10144: of four pairs in packs of one and three, a mean per pack weighs 1/2 and
    thrice 1/6; each must weigh 1/4."""
    model, traces = step
    four = traces[:8]
    alone = [
        gradient(model, four[i : i + 2], max_tokens=10_000, objective="dpo")[1]
        for i in (0, 2, 4, 6)
    ]
    objective, got = make_objective(recipe("dpo")), torch.zeros_like(alone[0])
    for part in (four[:2], four[2:]):
        (pack,) = pack_traces(part, 10_000)
        model.zero_grad()
        model(pack, partial(objective, StepCounts.of(four))).loss.backward()
        got += flat_gradient(model)
    assert_same(got, sum(alone) / 4)
    skewed = alone[0] / 2 + sum(alone[1:]) / 6
    assert (got - skewed).norm() > 0.1 * got.norm()


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_rewards_are_what_the_loss_sees(step, objective):
    model, traces = step
    counts, sums, loss = StepCounts.of(traces), torch.zeros(NUM_SUMS), 0.0
    packs = pack_step(traces, 64, pairs=True)
    assert len(packs) > 2
    for pack in [*packs, packs[0].without_targets()]:  # as on a rank that keeps step
        out = model(pack, partial(make_objective(recipe(objective)), counts))
        sums += pack_sums(pack, out)
        loss += out.loss.item()
    row = step_means(sums.tolist(), counts, rewards=True)
    _, _, logps = gradient(model, traces, max_tokens=10_000)
    reward = {
        (t.example, t.is_chosen): 0.3 * (logps[t.example, t.is_chosen] - t.ref_logp)
        if objective == "dpo"
        else 1.5 * logps[t.example, t.is_chosen] / (len(t.input_ids) - t.num_prompt_tokens)
        for t in traces
    }
    margins = torch.tensor([reward[i, True] - reward[i, False] for i in range(7)])
    assert row["rewards/chosen"] == pytest.approx(
        sum(reward[i, True] for i in range(7)) / 7, rel=1e-5
    )
    assert row["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert row["rewards/accuracies"] == pytest.approx((margins > 0).float().mean().item())
    gamma = 0 if objective == "dpo" else 0.7
    want = -torch.nn.functional.logsigmoid(margins - gamma).mean().item()
    assert loss == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_a_rank_that_has_nothing_to_do_adds_0_whatever_the_log_probs(step, objective):
    """Such a pack has no targets; one trace of its pair cannot be, by the reference."""
    model, traces = step
    traces = [replace(t, ref_logp=-torch.inf if t.is_chosen else 0.0) for t in traces[:2]]
    (pack,) = pack_step(traces, 500, pairs=True)
    run = make_objective(recipe(objective))
    out = model(pack.without_targets(), partial(run, StepCounts.of(traces)))
    assert out.loss.item() == 0 and not out.rewards_S.any()
    model.zero_grad()
    out.loss.backward()
    assert not flat_gradient(model).any()


def test_a_wrong_denominator_is_seen(step):
    """The check above can fail: counting per pack instead of per step is off by far."""
    model, traces = step
    _, truth, _ = gradient(model, traces, max_tokens=64)
    counts = StepCounts.of(traces[:6])
    _, grad, _ = gradient(model, traces, max_tokens=64, counts=counts)
    assert (grad - truth).norm() > 0.1 * truth.norm()


@pytest.mark.parametrize("objective", ["redi", "sft", "dpo", "simpo", *BOUNDS])
def test_packed_equals_padded(step, objective):
    model, traces = step
    traces = [t for t in traces if t.is_chosen] if objective == "sft" else traces
    loss, grad, _ = gradient(model, traces, max_tokens=64, objective=objective)
    want, truth = padded_oracle(model, traces, 0.8, objective)
    assert loss == pytest.approx(want, abs=2e-6)
    assert_same(grad, truth)


@pytest.mark.parametrize("window", [None, 2])
def test_negatives_from_the_divergence(step, window):
    """In any packing, as padded; the prefix that both traces share gets no gradient."""
    model, traces = step
    pairs = [push_from_divergence(traces[i : i + 2], window) for i in range(0, len(traces), 2)]
    traces = [trace for pair in pairs for trace in pair]
    want, truth = padded_oracle(model, traces, 0.8)
    for max_tokens in (40, 10_000):
        loss, grad, _ = gradient(model, traces, max_tokens=max_tokens)
        assert loss == pytest.approx(want, abs=2e-6)
        assert_same(grad, truth)
    whole = [replace(trace, pushed=None) for trace in traces]
    _, grad, _ = gradient(model, whole, max_tokens=40)
    assert (grad - truth).norm() > 0.1 * truth.norm()


def test_where_traces_diverge():
    def trace(text, is_chosen):
        return Trace(np.array([7, 7, *map(int, text)], dtype=np.int32), 2, is_chosen, 0)

    def pushed(chosen, rejected, window=None):
        pair = push_from_divergence([trace(chosen, True), trace(rejected, False)], window)
        assert pair[0].pushed is None
        return pair[1].pushed

    assert pushed("12345", "12946") == (4, 7)  # the first of two
    assert pushed("12345", "12945", window=1) == (4, 5)
    assert pushed("92345", "12345") == (2, 7)
    assert pushed("123", "12345") == (5, 7) and pushed("12345", "123") == (5, 5)
    (pack,) = pack_traces([trace("123", True), replace(trace("1943", False), pushed=(3, 5))], 99)
    assert pack.targets_T[pack.pushed_T & (torch.arange(11) >= 5)].tolist() == [9, 4]
    alone = [trace("12", True)]
    assert push_from_divergence(alone) is alone


def test_rows_without_a_pair_when_negatives_diverge(tmp_path):
    """A rejected trace alone has nothing to diverge from; a chosen one alone trains on."""
    rows = tiny.pair_rows()
    del rows[3]["chosen"], rows[5]["rejected"]
    settings = tiny.train_settings(tmp_path, rejected_tokens="diverging")
    tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = make_config(TrainConfig, settings, "test")
    data = load_data(config, load_tokenizer(config))
    assert [(d.id, d.reason) for d in data.dropped] == [
        ("sum-3", "no chosen trace to diverge from")
    ]
    assert [len(traces) for traces in data.traces].count(1) == 1
    assert all(t.pushed for traces in data.traces for t in traces if not t.is_chosen)
    tiny.write_jsonl(tmp_path / "pairs.jsonl", [rows[3], rows[5]])
    with pytest.raises(RediError, match="has no pairs"):
        load_data(config, load_tokenizer(config))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"objective": "dpo", "rejected_loss": "unlikelihood"}, "only objective: redi"),
        ({"alpha": 0.0, "rejected_floor": -2.0}, "alpha above 0"),
        ({"objective": "sft", "rejected_tokens": "diverging"}, "only objective: redi"),
        ({"rejected_loss": "unlikelihood", "rejected_floor": -2.0}, "choose one"),
        ({"rejected_window": 3}, "only with rejected_tokens"),
        ({"rejected_floor": 0.0}, "less than 0"),
    ],
)
def test_senseless_negatives_are_refused(tmp_path, changes, match):
    with pytest.raises(RediError, match=match):
        make_config(TrainConfig, tiny.train_settings(tmp_path, **changes), "test")


def test_alpha_zero_is_the_mean_of_per_sequence_nll(step):
    model, traces = step
    loss, grad, logps = gradient(model, traces, max_tokens=64, alpha=0.0)
    means = [
        -logps[t.example, True] / (len(t.input_ids) - t.num_prompt_tokens)
        for t in traces
        if t.is_chosen
    ]
    assert loss == pytest.approx(sum(means) / len(means), abs=1e-6)
    positives = [t for t in traces if t.is_chosen]
    _, truth, _ = gradient(model, positives, max_tokens=64, alpha=0.8)
    assert_same(grad, truth)


def test_rejected_term_is_minus_alpha_times_the_same_trace_as_chosen(step):
    model, traces = step
    rejected = [t for t in traces if not t.is_chosen]
    as_chosen = [replace(t, is_chosen=True) for t in rejected]
    down, grad_down, _ = gradient(model, rejected, max_tokens=64, alpha=0.8)
    up, grad_up, _ = gradient(model, as_chosen, max_tokens=64)
    assert down == pytest.approx(-0.8 * up, abs=1e-6)
    assert_same(grad_down, -0.8 * grad_up)


def test_prompts_get_no_gradient(step):
    """The head's hidden states at positions that predict prompt tokens: exactly zero."""
    model, traces = step
    counts, objective = StepCounts.of(traces), make_objective(recipe("redi", 0.8))
    pack = pack_traces(traces, 10_000)[0]
    x_TH = model(pack, lambda x, w, p, options: x).detach().requires_grad_()
    w_VH = model.lm.lm_head.weight
    objective(counts, x_TH, w_VH, pack, model.logit_options()).loss.backward()
    ignored = pack.targets_T == IGNORE_INDEX
    assert 0 < ignored.sum() < len(ignored)
    assert (x_TH.grad[ignored] == 0).all()
    assert (x_TH.grad[~ignored].abs().sum(1) > 0).all()


def test_stop_token_counts_and_is_trained(step):
    _, traces = step
    pack = pack_traces(traces, 10_000)[0]
    last_targets = pack.targets_T[pack.cu_seqlens[1:].long() - 2]
    assert (last_targets == 3).all()  # <e>
    tokens = sum(len(t.input_ids) - t.num_prompt_tokens for t in traces)
    assert (pack.targets_T != IGNORE_INDEX).sum() == tokens == StepCounts.of(traces).num_tokens


def test_gradient_checkpointing_changes_nothing(step, tmp_path):
    model, traces = step
    config = make_config(TrainConfig, tiny.train_settings(tmp_path), "test")
    _, truth, _ = gradient(model, traces, max_tokens=64)
    checkpointed = load_model(config.model_copy(update={"gradient_checkpointing": True}))
    checkpointed.load_state_dict(model.state_dict())
    assert any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.modules())
    _, grad, _ = gradient(checkpointed, traces, max_tokens=64)
    assert torch.equal(grad, truth)


@pytest.mark.parametrize("objective", ["sft", "redi", "dpo", "simpo"])
def test_loss_tolerance_reaches_the_loss(step, objective, monkeypatch):
    """One step in exact and in fast mode: the loss is the same, the gradient is fast.py's."""
    model, traces = step
    asked, gradients = [], fast.gradients
    monkeypatch.setattr(fast, "gradients", lambda *a: asked.append(a[-1]) or gradients(*a))
    counts = StepCounts.of(traces)
    losses = []
    for tolerance in (0.0, 2.0):
        config = recipe(objective).model_copy(update={"loss_tolerance": tolerance})
        (pack,) = pack_step(traces, 10_000, pairs=objective in NEEDS_PAIRS)
        out = model(pack, partial(make_objective(config), counts))
        out.loss.backward()
        losses.append(out.loss.item())
    assert asked == [2.0]
    assert losses[0] == losses[1]
