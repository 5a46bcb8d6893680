"""What the losses mean: identities of the paper's equation, packing, normalisation, options."""

import pytest
import torch
import torch.nn.functional as F
from redi_kernels import (
    dpo_loss,
    redi_loss,
    reference,
    sequence_logprobs,
    sft_loss,
    simpo_loss,
    token_logprobs,
)
from torch import Tensor

V, H = 61, 16
LENGTHS = [5, 9, 1, 0, 12, 7]
IS_CHOSEN = torch.tensor([True, False, True, False, False, True])


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp64 packed sequences whose first tokens are prompts; sequence 2 has no valid target."""
    g = torch.Generator().manual_seed(0)
    T = sum(LENGTHS)
    x_TH = torch.randn(T, H, generator=g, dtype=torch.float64).requires_grad_()
    w_VH = torch.randn(V, H, generator=g, dtype=torch.float64).requires_grad_()
    y_T = torch.randint(V, (T,), generator=g)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    y_T[0:2] = y_T[5:8] = -100
    y_T[14] = -100
    return x_TH, w_VH, y_T, cu_seqlens


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def sequences_alone(batch) -> list[tuple[Tensor, Tensor]]:
    """Each sequence's (log-probs of its valid targets, x grad slice bounds) by plain torch."""
    x_TH, w_VH, y_T, cu = batch
    out = []
    for s, e in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        valid = y_T[s:e] >= 0
        out.append(-F.cross_entropy((x_TH[s:e] @ w_VH.T)[valid], y_T[s:e][valid], reduction="none"))
    return out


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_redi_is_equation_5_of_the_paper(batch, alpha: float) -> None:
    x_TH, w_VH, y_T, cu = batch
    logps = sequences_alone(batch)
    means = [lp.mean() if len(lp) else lp.sum() for lp in logps]
    chosen = sum(m for m, c in zip(means, IS_CHOSEN, strict=True) if c) / int(IS_CHOSEN.sum())
    rejected = sum(m for m, c in zip(means, IS_CHOSEN, strict=True) if not c)
    want = -chosen + alpha * rejected / int((~IS_CHOSEN).sum())
    out = redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN, alpha=alpha)
    assert_same((out.loss,), (want,))
    assert_same(gradients(out.loss, x_TH, w_VH), gradients(want, x_TH, w_VH))
    assert_same((out.logps_S,), (torch.stack([lp.sum().detach() for lp in logps]),))
    assert_same((out.logp_T[y_T >= 0],), (torch.cat(logps).detach(),))
    assert out.lengths_S.tolist() == [len(lp) for lp in logps]
    truth = reference.redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN, alpha=alpha)
    assert_same((out.loss,), (truth,))


PUSHED = torch.arange(sum(LENGTHS)) % 3 > 0
# What takes the place of a rejected token's log p; the batch's are from -44 to -0.004.
BOUNDS = {
    "unlikelihood": ({"rejected_loss": "unlikelihood"}, lambda lp: -(1 - lp.exp()).log()),
    "floor": ({"rejected_floor": -12.0}, lambda lp: torch.where(lp < -12, -12.0, lp)),
    "some pushed": ({"pushed_T": PUSHED}, lambda lp: lp),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounded_negatives_against_plain_torch(batch, bound: str) -> None:
    """Rejected sequences are 1, 3 (empty) and 4; all their targets from `first` on are valid."""
    options, function = BOUNDS[bound]
    x_TH, w_VH, y_T, cu = batch
    logps = sequences_alone(batch)
    chosen = sum(logps[i].sum() / max(len(logps[i]), 1) for i in (0, 2, 5)) / 3
    below = {i: logps[i] < -12 for i in (1, 4)}
    assert any(b.any() for b in below.values()) and not all(b.all() for b in below.values())
    rejected = torch.zeros((), dtype=torch.float64)
    for i in (1, 4):
        rows = torch.arange(int(cu[i]), int(cu[i + 1]))
        rows = rows[y_T[rows] >= 0]
        kept = PUSHED[rows] if bound == "some pushed" else torch.ones(len(rows), dtype=torch.bool)
        rejected = rejected + function(logps[i])[kept].sum() / len(logps[i]) / 3
    want = -chosen + 0.7 * rejected
    out = redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN, alpha=0.7, **options)
    assert_same((out.loss,), (want,))
    assert_same(gradients(out.loss, x_TH, w_VH), gradients(want, x_TH, w_VH))
    plain = redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN, alpha=0.7)
    assert_same((out.logps_S, out.logp_T), (plain.logps_S, plain.logp_T))
    assert torch.equal(out.lengths_S, plain.lengths_S) and not out.logp_T.requires_grad


def test_unlikelihood_of_certain_tokens_is_finite_and_pushes_none() -> None:
    """fp32 cannot tell p from 1 there; what is nearly as sure is pushed by its logit's p."""
    x_TH = torch.eye(3, 8).requires_grad_()
    w_VH = torch.zeros(5, 8)
    w_VH[0, :3] = torch.tensor([200.0, 8.0, 0.0])  # p = 1, 1 - 1.3e-3, 1/5
    out = redi_loss(
        x_TH, w_VH, torch.zeros(3, dtype=torch.long), torch.tensor([0, 3]), torch.tensor([False]),
        alpha=1.0, rejected_loss="unlikelihood",
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite() and (out.logp_T[0] == 0)
    assert (x_TH.grad[0] == 0).all()
    p_T = torch.softmax(torch.tensor([200.0, 8, 0])[:, None] * torch.eye(5)[0], 1)[:, 0]
    torch.testing.assert_close(x_TH.grad[1, 1], p_T[1] * 8 / 3, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rejected_loss": "hinge"}, "unlikelihood"),
        ({"rejected_floor": 0.5}, "below 0"),
        ({"rejected_floor": -2.0, "rejected_loss": "unlikelihood"}, "rejected_floor"),
        ({"pushed_T": PUSHED[:-1]}, "pushed_T"),
        ({"pushed_T": PUSHED.long()}, "pushed_T"),
    ],
)
def test_bad_bounds_are_refused(batch, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        redi_loss(*batch, IS_CHOSEN, **options)


def test_alpha_zero_is_the_mean_of_per_sequence_nll(batch) -> None:
    x_TH, w_VH, y_T, cu = batch
    all_chosen = torch.ones(len(LENGTHS), dtype=torch.bool)
    nll = [-lp.mean() if len(lp) else lp.sum() for lp in sequences_alone(batch)]
    zero = redi_loss(x_TH, w_VH, y_T, cu, all_chosen, alpha=0.0)
    assert_same((zero.loss,), (torch.stack(nll).mean(),))
    some = redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN, alpha=0.0)
    rejected_T = torch.repeat_interleave(~IS_CHOSEN, torch.tensor(LENGTHS))
    dx_TH, _ = gradients(some.loss, x_TH, w_VH)
    assert not dx_TH[rejected_T].any() and dx_TH.any()


def test_rejected_term_is_minus_alpha_times_the_same_sequence_as_chosen(batch) -> None:
    x_TH, w_VH, y_T, cu = batch
    yes = torch.ones(len(LENGTHS), dtype=torch.bool)
    as_chosen = redi_loss(x_TH, w_VH, y_T, cu, yes, alpha=0.3)
    as_rejected = redi_loss(x_TH, w_VH, y_T, cu, ~yes, alpha=0.3)
    want = [-0.3 * g for g in gradients(as_chosen.loss, x_TH, w_VH)]
    assert_same(gradients(as_rejected.loss, x_TH, w_VH), tuple(want))
    assert_same((as_rejected.loss,), (-0.3 * as_chosen.loss,))


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_fused_equals_primitive_with_plain_torch(batch, alpha: float) -> None:
    x_TH, w_VH, y_T, cu = batch
    options = {"softcap": 9.0, "logit_scale": 0.8, "bias": torch.randn(V, dtype=torch.float64)}
    fused = redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN, alpha=alpha, **options)
    logp_T = token_logprobs(x_TH, w_VH, y_T, **options).logp_T
    mean_S = sequence_logprobs(logp_T, cu, y_T).mean_S
    plain = -mean_S[IS_CHOSEN].mean() + alpha * mean_S[~IS_CHOSEN].mean()
    assert_same((fused.loss,), (plain,))
    assert_same(gradients(fused.loss, x_TH, w_VH), gradients(plain, x_TH, w_VH))


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0, 1e-4])
@pytest.mark.parametrize("keep_graph", [False, True])
def test_upstream_gradient_scales(batch, factor: float, keep_graph: bool) -> None:
    x_TH, w_VH, y_T, cu = batch
    one = gradients(redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN).loss, x_TH, w_VH)
    loss = redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN).loss * factor
    for _ in range(1 + keep_graph):
        got = torch.autograd.grad(loss, (x_TH, w_VH), retain_graph=keep_graph)
        assert_same(got, tuple(factor * g for g in one))


@pytest.mark.parametrize("bound", [None, *BOUNDS])
def test_any_split_and_order_of_a_batch_gives_the_same_gradient(batch, bound) -> None:
    x_TH, w_VH, y_T, cu = batch
    options = BOUNDS[bound][0] if bound else {}
    want = redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN, **options).loss
    whole = gradients(want, x_TH, w_VH)
    counts = {"num_chosen": int(IS_CHOSEN.sum()), "num_rejected": int((~IS_CHOSEN).sum())}
    for order, cuts in (([5, 0, 3, 1, 4, 2], [1, 4]), ([2, 1, 0, 4, 3, 5], [3]), (range(6), [])):
        dx_TH, dw_VH, total = torch.zeros_like(x_TH), torch.zeros_like(w_VH), 0.0
        for micro in torch.tensor(list(order)).tensor_split(cuts):
            rows = torch.cat([torch.arange(int(cu[s]), int(cu[s + 1])) for s in micro])
            micro_cu = F.pad(cu.diff()[micro].cumsum(0), (1, 0)).int()
            args = x_TH[rows], w_VH, y_T[rows], micro_cu, IS_CHOSEN[micro]
            mine = {k: v[rows] if k == "pushed_T" else v for k, v in options.items()}
            loss = redi_loss(*args, **mine, **counts).loss
            grads = gradients(loss, x_TH, w_VH)
            dx_TH, dw_VH, total = dx_TH + grads[0], dw_VH + grads[1], total + loss
        assert_same((dx_TH, dw_VH), whole)
        assert_same((total,), (want,))


def test_prompts_get_exactly_zero_gradient_and_do_not_matter(batch) -> None:
    x_TH, w_VH, y_T, cu = batch
    prompt_T = y_T == -100
    dx_TH, dw_VH = gradients(redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN).loss, x_TH, w_VH)
    assert not dx_TH[prompt_T].any() and dx_TH[~prompt_T].all(dim=1).all()
    poisoned = x_TH.detach().masked_fill(prompt_T[:, None], torch.nan).requires_grad_()
    got = gradients(redi_loss(poisoned, w_VH, y_T, cu, IS_CHOSEN).loss, poisoned, w_VH)
    assert torch.equal(got[0], dx_TH) and torch.equal(got[1], dw_VH)


def test_another_ignore_index(batch) -> None:
    x_TH, w_VH, y_T, cu = batch
    other = y_T.masked_fill(y_T == -100, 7_000)
    for fn, args in ((redi_loss, (cu, IS_CHOSEN)), (sft_loss, (cu,))):
        a, b = fn(x_TH, w_VH, y_T, *args), fn(x_TH, w_VH, other, *args, ignore_index=7_000)
        assert torch.equal(a.loss, b.loss) and torch.equal(a.lengths_S, b.lengths_S)
        assert torch.equal(*(gradients(o.loss, w_VH)[0] for o in (a, b)))


def test_sft_is_cross_entropy(batch) -> None:
    x_TH, w_VH, y_T, cu = batch
    want = F.cross_entropy(x_TH @ w_VH.T, y_T)
    out = sft_loss(x_TH, w_VH, y_T)
    assert_same((out.loss,), (want,))
    assert_same(gradients(out.loss, x_TH, w_VH), gradients(want, x_TH, w_VH))
    assert_same((reference.sft_loss(x_TH, w_VH, y_T),), (want,))
    assert out.logps_S is None and out.lengths_S is None
    half = sft_loss(x_TH, w_VH, y_T, cu, num_tokens=2 * int((y_T >= 0).sum()))
    assert_same((half.loss,), (want / 2,))
    assert_same((half.logps_S,), (redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN).logps_S,))


@pytest.mark.parametrize("pairs", [1, 3])
def test_dpo_and_simpo(batch, pairs: int) -> None:
    """Several pairs by the primitive, one, its rejected sequence first, by the fused path."""
    (x_TH, w_VH, y_T, cu), chosen_S = batch, IS_CHOSEN
    if pairs == 1:
        i = next(i for i, chosen in enumerate(IS_CHOSEN) if i and chosen and LENGTHS[i - 1])
        tokens = slice(cu[i - 1], cu[i + 1])
        x_TH, y_T, cu = x_TH[tokens], y_T[tokens], cu[i - 1 : i + 2] - cu[i - 1]
        chosen_S = IS_CHOSEN[i - 1 : i + 1]
        assert chosen_S.tolist() == [False, True]
    logps = sequences_alone((x_TH, w_VH, y_T, cu))
    ref_S = torch.randn(2 * pairs, dtype=torch.float64)
    sums = torch.stack([lp.sum() for lp in logps])
    means = torch.stack([lp.mean() if len(lp) else lp.sum() for lp in logps])
    ref_gap = ref_S[chosen_S] - ref_S[~chosen_S]
    cases = [
        (
            dpo_loss(x_TH, w_VH, y_T, cu, chosen_S, ref_S, beta=0.2),
            reference.dpo_loss(sums[chosen_S], sums[~chosen_S], ref_gap, beta=0.2),
        ),
        (
            simpo_loss(x_TH, w_VH, y_T, cu, chosen_S, beta=1.5, gamma=0.4),
            reference.simpo_loss(means[chosen_S], means[~chosen_S], beta=1.5, gamma=0.4),
        ),
    ]
    for out, want in cases:
        assert_same((out.loss,), (want,))
        want = torch.autograd.grad(want, (x_TH, w_VH), retain_graph=True)  # the cases share a graph
        assert_same(gradients(out.loss, x_TH, w_VH), want)
        assert out.margins.shape == (pairs,)
        assert_same((out.logps_S, out.logp_T[y_T >= 0]), (sums.detach(), torch.cat(logps).detach()))
    half = simpo_loss(x_TH, w_VH, y_T, cu, chosen_S, beta=1.5, gamma=0.4, num_pairs=2 * pairs)
    assert_same((2 * half.loss,), (cases[1][0].loss,))
    assert_same(gradients(2 * half.loss, x_TH, w_VH), want)
    with pytest.raises(ValueError, match="not pairs"):
        simpo_loss(x_TH, w_VH, y_T, cu, torch.ones_like(chosen_S))


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_pair_alone_is_fused(pairs: int, monkeypatch) -> None:
    """3 U, as bench/count.py counts it, instead of the primitive's 4."""
    from redi_kernels import cpu

    calls = []
    for name in ("weighted", "forward", "backward"):
        run = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *args, name=name, run=run: (calls.append(name), run(*args))[1]
        )
    x_TH, w_VH = torch.randn(8, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    cu, chosen_S = torch.linspace(0, 8, 2 * pairs + 1).int(), torch.arange(2 * pairs) % 2 == 0
    simpo_loss(x_TH, w_VH, torch.arange(8), cu, chosen_S).loss.backward()
    assert calls == (["weighted"] if pairs == 1 else ["forward", "backward"])


def test_differentiable_lse(batch) -> None:
    x_TH, w_VH, y_T, _ = batch
    out = token_logprobs(x_TH, w_VH, y_T)
    lse_T = (x_TH @ w_VH.T).logsumexp(dim=1) * (y_T >= 0)
    assert_same((out.lse_T,), (lse_T,))
    got = gradients((out.lse_T**2).sum(), x_TH, w_VH)
    assert_same(got, gradients((lse_T**2).sum(), x_TH, w_VH))


@pytest.mark.parametrize("frozen", ["x_TH", "w_VH", "bias"])
@pytest.mark.parametrize("path", ["fused", "primitive"])
def test_frozen_parts_get_no_gradient_and_cost_nothing(batch, frozen, path, monkeypatch) -> None:
    from redi_kernels import cpu

    x_TH, w_VH, y_T, cu = batch
    leaves = {"x_TH": x_TH, "w_VH": w_VH, "bias": torch.randn(V).double().requires_grad_()}

    def loss() -> Tensor:
        if path == "fused":
            args = leaves["x_TH"], leaves["w_VH"], y_T, cu, IS_CHOSEN
            return redi_loss(*args, bias=leaves["bias"]).loss
        out = token_logprobs(leaves["x_TH"], leaves["w_VH"], y_T, bias=leaves["bias"])
        return out.logp_T.sum()

    full = dict(zip(leaves, gradients(loss(), *leaves.values()), strict=True))
    seen = []
    init = cpu.Gradients.__init__
    monkeypatch.setattr(
        cpu.Gradients, "__init__", lambda self, *a: (seen.append(a[-1]), init(self, *a))[1]
    )
    leaves[frozen] = leaves[frozen].detach()
    rest = [name for name in leaves if name != frozen]
    got = gradients(loss(), *(leaves[name] for name in rest))
    assert_same(got, tuple(full[name] for name in rest))
    assert [tuple(needs) for needs in seen] == [tuple(name != frozen for name in leaves)]


def test_no_grad_is_only_a_forward(batch, monkeypatch: pytest.MonkeyPatch) -> None:
    from redi_kernels import cpu

    def refuse(*args) -> None:
        raise AssertionError("a gradient was made under no_grad")

    x_TH, w_VH, y_T, cu = batch
    want = redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN)
    monkeypatch.setattr(cpu.Gradients, "add_block", refuse)
    with torch.no_grad():
        got = redi_loss(x_TH, w_VH, y_T, cu, IS_CHOSEN)
    assert torch.equal(got.loss, want.loss) and not got.loss.requires_grad


def test_fp16_gradients_reach_the_loss_scale_unrounded() -> None:
    """Weights of 1e-6 a token would leave fp16's range before GradScaler's factor comes."""
    g = torch.Generator().manual_seed(0)
    half = [torch.randn(n, H, generator=g).half().requires_grad_() for n in (96, V)]
    wide = [leaf.detach().float().requires_grad_() for leaf in half]
    y_T, cu = torch.randint(V, (96,), generator=g), torch.tensor([0, 50, 96]).int()
    grads = []
    for leaves in (half, wide):
        counts = {"num_chosen": 20_000, "num_rejected": 20_000}
        loss = redi_loss(*leaves, y_T, cu, torch.tensor([True, False]), **counts).loss
        grads.append([grad.float() for grad in gradients(65_536 * loss, *leaves)])
    for got, want in zip(*grads, strict=True):
        assert (got - want).norm() < 2e-3 * want.norm()


@pytest.mark.parametrize("sequences", [2, 4])
def test_pairs_are_marked_by_booleans_and_compared_in_full_precision(sequences: int) -> None:
    x_TH, w_VH, cu = torch.randn(8, H), torch.randn(V, H), torch.linspace(0, 8, sequences + 1).int()
    with pytest.raises(ValueError, match=r"is_chosen_S must be bool \[\d\].* not torch.int64"):
        simpo_loss(x_TH, w_VH, torch.arange(8), cu, 1 - torch.arange(sequences) % 2)
    chosen_S, rounded_S = torch.arange(sequences) % 2 == 0, torch.zeros(sequences).bfloat16()
    with pytest.raises(ValueError, match=r"ref_logps_S is torch\.bfloat16, too coarse"):
        dpo_loss(x_TH, w_VH, torch.arange(8), cu, chosen_S, rounded_S)
