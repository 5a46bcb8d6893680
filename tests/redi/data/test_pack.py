from dataclasses import replace

import numpy as np
import packing  # bench/packing.py: the lengths and the measure of its table
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redi.data.pack import (
    IGNORE_INDEX,
    _best_fit,
    _fill,
    arrange,
    pack_step,
    pack_traces,
    trace_cost,
)
from redi.data.tokenize import Trace


def make_trace(prompt: int, completion: int, example: int) -> Trace:
    """Ids tell example and position apart."""
    ids = 1000 * example + np.arange(prompt + completion)
    return Trace(ids.astype(np.int32), prompt, example % 3 != 0, example)


traces_of_a_step = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), max_size=30).map(
    lambda sizes: [make_trace(*size, i) for i, size in enumerate(sizes)]
)


@settings(max_examples=300, deadline=None)
@given(traces_of_a_step, st.integers(1, 80))
def test_every_trace_is_in_one_pack_whole(traces, max_tokens):
    packs = pack_traces(traces, max_tokens)
    seen = []
    for pack in packs:
        assert pack.cu_seqlens.dtype == torch.int32
        assert pack.cu_seqlens.tolist() == np.cumsum([0, *pack.seqlens]).tolist()
        assert len(pack.input_ids_T) == sum(pack.seqlens)
        assert len(pack.examples) == len(pack.seqlens) == len(pack.is_chosen_S)
        assert sum(pack.seqlens) <= max_tokens or len(pack.seqlens) == 1
        for s, example in enumerate(pack.examples):
            part = slice(pack.cu_seqlens[s], pack.cu_seqlens[s + 1])
            trace = traces[example]
            assert pack.input_ids_T[part].tolist() == trace.input_ids.tolist()
            assert pack.position_ids_T[part].tolist() == list(range(len(trace.input_ids)))
            assert pack.targets_T[part].tolist() == naive_targets(trace)
            assert bool(pack.is_chosen_S[s]) == trace.is_chosen
        seen += pack.examples
    assert sorted(seen) == list(range(len(traces)))


def naive_targets(trace: Trace) -> list[int]:
    """Shift the labels of the padded-batch trainers: prompt masked, then one to the left."""
    labels = [
        int(token) if position >= trace.num_prompt_tokens else -100
        for position, token in enumerate(trace.input_ids)
    ]
    return [*labels[1:], -100]


@settings(max_examples=100, deadline=None)
@given(traces_of_a_step, st.integers(1, 80))
def test_packing_is_tight(traces, max_tokens):
    """Best fit leaves no two packs that would fit into one."""
    sizes = sorted(sum(pack.seqlens) for pack in pack_traces(traces, max_tokens))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > max_tokens


def test_best_fit_fills_the_fullest_pack_first():
    lengths = [5, 4, 3, 3, 2, 1]
    traces = [make_trace(1, length - 1, i) for i, length in enumerate(lengths)]
    assert [pack.examples for pack in pack_traces(traces, 6)] == [(0, 5), (1, 4), (2, 3)]


def test_packing_depends_on_its_arguments_only():
    traces = [make_trace(2, 1 + i * 7 % 5, i) for i in range(40)]
    first, second = pack_traces(traces, 20), pack_traces(traces, 20)
    assert [pack.examples for pack in first] == [pack.examples for pack in second]
    assert all(list(pack.examples) == sorted(pack.examples) for pack in first)


def test_no_traces_no_packs():
    assert pack_traces([], 10) == []


sizes_of_a_step = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1)


@settings(max_examples=200, deadline=None)
@given(sizes_of_a_step, st.integers(1, 80), st.integers(1, 5), st.booleans())
def test_a_step_over_ranks(sizes, max_tokens, world_size, pairs):
    """Each trace on one rank, whole; equally many forwards; pairs in one pack, side by side."""
    traces = [replace(make_trace(*size, i), example=i // 2) for i, size in enumerate(sizes)]
    ranks = [
        pack_step(traces, max_tokens, rank=rank, world_size=world_size, pairs=pairs)
        for rank in range(world_size)
    ]
    assert len({len(packs) for packs in ranks}) == 1
    seen = []
    for pack in (pack for packs in ranks for pack in packs):
        assert pack.is_trained == bool((pack.targets_T != IGNORE_INDEX).any())
        if not pack.is_trained:
            continue
        starts = pack.cu_seqlens[:-1].long()
        seen += pack.input_ids_T[starts].tolist()
        units = len(set(pack.examples)) if pairs else len(pack.seqlens)
        assert sum(pack.seqlens) <= max_tokens or units == 1
        if pairs:
            assert list(pack.examples) == sorted(pack.examples)
            both = [pack.examples.count(i) for i in set(pack.examples)]
            assert both == [sum(t.example == i for t in traces) for i in set(pack.examples)]
    assert sorted(seen) == sorted(int(trace.input_ids[0]) for trace in traces)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("draw", [packing.paper_lengths, packing.heavy_lengths])
def test_ranks_carry_equal_cost(draw, world_size, pairs):
    """Within 5% at 64 traces, or of the one trace (pair) that costs more than a rank's mean."""
    for seed in range(20):
        lengths = draw(32, np.random.default_rng(seed))
        costs_RF = packing.costs(lengths, world_size, pairs, max_tokens=32768)
        bound = packing.at_best(lengths, world_size, pairs)
        assert packing.balance(costs_RF) <= packing.LIMIT * bound
        if draw is packing.paper_lengths and world_size == 8:  # so it says something
            dealt = [[sum(map(trace_cost, lengths.flat[r::8]))] for r in range(8)]
            assert packing.balance(np.array(dealt)) > packing.LIMIT
            assert bound == 1


def test_the_same_step_is_arranged_the_same():
    lengths = packing.paper_lengths(32, np.random.default_rng(0)).flatten().tolist()
    assert arrange(lengths, 32768, world_size=4) == arrange(lengths, 32768, world_size=4)


def test_ranks_without_traces_still_run_forwards():
    first, second = (pack_step([make_trace(2, 5, 0)], 9, rank=r, world_size=2)[0] for r in (0, 1))
    assert first.examples == second.examples == (0,)
    assert (first.targets_T != IGNORE_INDEX).sum() == 5
    assert (second.targets_T == IGNORE_INDEX).all()


def test_tight_packs_are_halved_to_make_up_the_number():
    """Six long traces leave three bins for the 38 short ones if cost alone decides: 13 in one."""
    lengths = [7] * 6 + [1] * 38
    assert len(_best_fit(lengths, 10)) == 8
    bins = _fill(lengths, np.square(lengths), 9, 10)
    assert len(bins) == 9
    assert sorted(u for bin in bins for u in bin) == list(range(44))
    assert max(sum(lengths[u] for u in bin) for bin in bins) <= 10
