import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redi.data.pack import pack_traces
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
