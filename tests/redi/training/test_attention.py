"""Packed attention: a trace's hidden states do not depend on its neighbours, in any family."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from redi.errors import RediError
from redi.training import attention
from redi.training.rehearsal import LiveBytes

SEQLENS = (7, 19, 1, 12, 12)


def run_packed(lm, rows, **kwargs):
    attention.register()
    lm.set_attn_implementation(attention.NAME)
    seqlens = tuple(len(row) for row in rows)
    return lm.model(
        input_ids=torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(n) for n in seqlens])[None],
        use_cache=False,
        ends_S=torch.tensor((0, *seqlens)).cumsum(0).int(),
        seqlens=seqlens,
        **kwargs,
    ).last_hidden_state[0]


def run_alone(lm, rows):
    """The oracle: stock eager attention, one trace at a time."""
    lm.set_attn_implementation("eager")
    return torch.cat(
        [lm.model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
    )


@pytest.fixture(params=["side by side", "one by one"])
def rows(request):
    generator = torch.Generator().manual_seed(1)
    seqlens = SEQLENS if request.param == "side by side" else (40, 3, 2, 9)
    side_by_side = len(seqlens) * max(seqlens) <= 2 * sum(seqlens)
    assert side_by_side == (request.param == "side by side")
    return [torch.randint(0, 96, (n,), generator=generator) for n in seqlens]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_equals_one_at_a_time(family, rows):
    lm = tiny.make_lm(family)
    alone = run_alone(lm, rows)
    error = (run_packed(lm, rows) - alone).abs().max() / alone.abs().max()
    assert error < 2e-5
    # The check can fail: without boundaries (all one trace) the states are far off.
    mixed = run_packed(lm, [torch.cat(rows)])
    assert (mixed - alone).abs().max() / alone.abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_gradients_equal_one_at_a_time(family, rows):
    lm = tiny.make_lm(family)
    gradients = []
    for run in (run_packed, run_alone):
        lm.zero_grad()
        run(lm, rows).sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in lm.model.parameters()]))
    packed, alone = gradients
    assert (packed - alone).norm() < 1e-4 * alone.norm()


def test_long_windowed_trace_in_query_blocks(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    lm = tiny.make_lm("gemma2")
    rows = [torch.arange(50) % 96, torch.arange(3)]
    alone = run_alone(lm, rows)
    assert (run_packed(lm, rows) - alone).abs().max() < 2e-5 * alone.abs().max()


def test_a_mask_is_refused():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="no attention mask"):
        attention.varlen_attention(
            None, q, q, q, torch.ones(4, 4), ends_S=torch.tensor([0, 4]), seqlens=(4,)
        )


class Watch(TorchDispatchMode):
    """The largest tensor made, and the FLOP of attention: 2 per query, key and channel, twice."""

    def __init__(self):
        super().__init__()
        self.largest = self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else [out]
        self.largest = max([self.largest, *(o.numel() for o in outs if torch.is_tensor(o))])
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and "backward" not in name:
            q, k = args[:2]
            self.flop += 4 * q.numel() * k.shape[2]
        elif name == "bmm":  # scores, and their mean of values
            self.flop += 2 * args[0].numel() * args[1].shape[2]
        return out


SHAPINGS = [{}, {"sliding_window": 16}, {"softcap": 5.0}]


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_no_memory_quadratic_in_the_pack(shaping):
    """1,024 traces of 32 tokens: a T*T mask or score matrix alone would be a gigabyte and more."""
    seqlens = (32,) * 1024
    q = torch.randn(1, 2, sum(seqlens), 8, requires_grad=True)
    with Watch() as watch:
        out, _ = attention.varlen_attention(
            None, q, q, q, None,
            ends_S=torch.arange(0, 32769, 32).int(), seqlens=seqlens, **shaping,
        )  # fmt: skip
        out.sum().backward()
    # The scores of a trace are 32 a query: four times its channels.
    assert watch.largest <= (4 if shaping else 2) * q.numel()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_mask_in_the_whole_model(family):
    """T*T is 2.4 million; the largest tensor is a layer's, T times a few dozen."""
    lm = tiny.make_lm(family)
    rows = [torch.arange(31) % 96] * 50
    with Watch() as watch:
        run_packed(lm, rows).sum().backward()
    assert watch.largest < 1550**2 / 10


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_cost_grows_with_the_sum_of_squared_lengths(shaping):
    """Measured in FLOP: twice the traces cost twice as much, twice the length four times; with a
    window twice; soft-capped somewhat less than four times, in blocks that end at the diagonal."""

    def flop(*seqlens):
        q = torch.randn(1, 2, sum(seqlens), 8)
        cu_seqlens = torch.tensor((0, *seqlens)).cumsum(0).int()
        with Watch() as watch:
            attention.varlen_attention(
                None, q, q, q, None, ends_S=cu_seqlens, seqlens=seqlens, **shaping
            )
        return watch.flop

    one = flop(1024)
    assert one > 0
    assert flop(1024, 1024) == 2 * one
    growth = flop(2048) / one
    assert growth < 2.2 if "sliding_window" in shaping else 3 < growth <= 4
    uneven = (900, 30, 400, 7, 7, 80)
    whole = sum(flop(n) for n in uneven)
    assert flop(*uneven) == whole  # trace by trace
    long = (170, 164, 150, 161)  # even, but too long for padding to be cheap
    assert flop(*long) == sum(flop(n) for n in long)
    even = (64, 60, 50, 61)  # side by side: padded, at most to twice the tokens
    assert flop(*even) <= 2 * sum(flop(n) for n in even)


@pytest.mark.parametrize("shaping", SHAPINGS[1:])
def test_the_backward_keeps_no_blocks_scores(shaping, monkeypatch):
    """Bytes that live at once in forward and backward: twice the length takes about twice as many
    (all scores: four times). The gradient is that of one block."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 64)

    def run(length):
        torch.manual_seed(0)
        q = torch.randn(1, 2, length, 8, requires_grad=True)
        with LiveBytes() as live:
            out, _ = attention.varlen_attention(
                None, q, q, q, None,
                ends_S=torch.tensor([0, length]).int(), seqlens=(length,), **shaping,
            )  # fmt: skip
            out.sin().sum().backward()
        return live.peak, q.grad

    (short, _), (long, in_blocks) = run(1024), run(2048)
    assert long < 2.3 * short
    assert long < 2048 * 2048 * 4  # one head's scores
    monkeypatch.setattr(attention, "QUERY_BLOCK", 2048)
    assert (in_blocks - run(2048)[1]).norm() < 1e-6 * in_blocks.norm()


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_flash_attention_gets_what_it_takes(dtype, monkeypatch):
    """It refuses float32, in which `redi traces` scores and `bf16: false` trains."""
    asked = []
    flash = lambda q, *args, **kwargs: (asked.append(q.dtype), q)[1]
    monkeypatch.setattr(attention, "_flash_varlen", lambda: flash)
    q, k, v = (torch.randn(1, heads, 9, 8).to(dtype).as_subclass(OnCuda) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 4, 9]).int()
    attention.varlen_attention(None, q, k, v, None, ends_S=cu_seqlens, seqlens=(4, 5))
    assert asked == ([] if dtype == torch.float32 else [dtype])


def test_a_choice_of_keys_is_not_dropped():
    """An indexer's; while a trace has fewer keys than it chooses, nothing else would show it."""
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(RediError, match="gives its attention indices"):
        attention.varlen_attention(
            None, q, q, q, None, ends_S=torch.tensor([0, 4]), seqlens=(4,), indices=q
        )


def test_flash_attention_gets_heads_that_it_takes():
    heads = lambda size: torch.zeros(3, 2, size, dtype=torch.bfloat16)
    assert attention._fits_flash(heads(128), heads(128))
    assert not attention._fits_flash(heads(192), heads(128))  # DeepSeek's
    assert not attention._fits_flash(heads(512), heads(512))  # Gemma 4's
