"""Liger, torch.compile and checkpointing change how blocks compute, not what."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from redi.config import TrainConfig
from redi.data.pack import pack_traces
from redi.errors import RediError
from redi.recipe import make_config
from redi.training import blocks
from redi.training.loop import load_data
from redi.training.model import load_model, load_tokenizer


def config(folder, **changes) -> TrainConfig:
    return make_config(TrainConfig, tiny.train_settings(folder, **changes), "test")


def gradient(folder, **changes):
    """Of a smooth function of the hidden states, over a few packs; and the model."""
    settings = config(folder, **changes)
    model = load_model(settings)
    traces = load_data(settings, load_tokenizer(settings)).traces
    for pack in pack_traces([t for example in traces for t in example], 60):
        model(pack, lambda x_TH, *_: x_TH.sin().sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), model


def test_checkpointing_and_offloading_change_no_bit(tmp_path, monkeypatch):
    offloads = []
    real = blocks._to_host
    monkeypatch.setattr(blocks, "_to_host", lambda t: offloads.append(t.nbytes) or real(t))
    plain, _ = gradient(tmp_path, gradient_checkpointing="none")
    full, _ = gradient(tmp_path, gradient_checkpointing="full")
    selective, _ = gradient(tmp_path, gradient_checkpointing="selective")
    assert not offloads
    offloaded, model = gradient(tmp_path, gradient_checkpointing="offload")
    assert len(offloads) % len(model.lm.model.layers) == 0 < sum(offloads)
    assert torch.equal(full, plain)
    assert torch.equal(selective, plain)
    assert torch.equal(offloaded, full)


@pytest.mark.parametrize("how", ["none", "selective", "full", "offload"])
def test_what_checkpointing_keeps(tmp_path, how):
    """Bytes that the forward saves for the backward, in this thread's view of autograd."""
    model = load_model(config(tmp_path, gradient_checkpointing=how))
    pack = pack_traces(_traces(tmp_path), 200)[0]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.nbytes}) or t, lambda t: t
    ):
        out = model(pack, lambda x_TH, *_: x_TH.sin().sum())
    states = len(pack.input_ids_T) * 32 * 4  # one [T, H] float32
    in_blocks = sum(kept.values()) - sum(p.nbytes for p in model.parameters())
    out.backward()
    assert (in_blocks > 20 * states) == (how == "none")


@pytest.mark.parametrize(
    ("how", "attentions", "mlps"),
    [
        ({"gradient_checkpointing": "none"}, 3, 3),
        ({"gradient_checkpointing": "selective"}, 3, 5),
        ({"gradient_checkpointing": "selective", "kept_blocks": 0}, 3, 6),
        ({"gradient_checkpointing": "selective", "kept_blocks": 2}, 3, 4),
        ({"gradient_checkpointing": "selective", "kept_blocks": 99}, 3, 3),
        ({"gradient_checkpointing": "full"}, 6, 6),
    ],
)
def test_what_is_computed_again(tmp_path, how, attentions, mlps):
    """Of three blocks; selective spares attention, and all of the last block or of more."""
    model = load_model(config(tmp_path, **how))
    calls = Counter()
    for layer in model.lm.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.update(["mlp"]))
    pack = pack_traces(_traces(tmp_path)[:1], 200)[0]  # one trace: one call of SDPA

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls["attention"] += func.name().endswith("attention_for_cpu")
            return func(*args, **(kwargs or {}))

    with Count():
        model(pack, lambda x_TH, *_: x_TH.sin().sum()).backward()
    assert calls == {"attention": attentions, "mlp": mlps}


def _traces(folder):
    settings = config(folder)
    data = load_data(settings, load_tokenizer(settings))
    return [trace for example in data.traces for trace in example]


def test_kept_blocks_without_selective_is_an_error(tmp_path):
    with pytest.raises(RediError, match="kept_blocks: only with gradient_checkpointing: selective"):
        config(tmp_path, gradient_checkpointing="full", kept_blocks=2)


def test_users_of_transformers_write_true(tmp_path):
    for written, meant in [(True, "full"), (False, "none"), ("selective", "selective")]:
        assert config(tmp_path, gradient_checkpointing=written).gradient_checkpointing == meant
    with pytest.raises(
        RediError, match=r"gradient_checkpointing.*'none', 'selective', 'full' or 'offload'"
    ):
        config(tmp_path, gradient_checkpointing="some")


def test_liger_is_asked_for_in_vain(tmp_path, monkeypatch):
    with pytest.raises(RediError, match="need a GPU"):
        load_model(config(tmp_path, use_liger_kernel=True))
    monkeypatch.setattr(blocks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RediError, match="pip install liger-kernel"):
        load_model(config(tmp_path, use_liger_kernel=True))
    load_model(config(tmp_path))  # by default it is used where it can be


@pytest.mark.linux
@pytest.mark.parametrize(("family", "known"), [("glm4", True), ("cohere2", False)])
def test_liger_decides_what_it_has_for_a_family(family, known):
    """It has no RoPE for GLM-4; a family that it does not know at all is an error if asked for."""
    lm = tiny.make_lm(family, pad_token_id=0)
    blocks.use_liger(lm, torch.device("cuda"))
    if known:
        return blocks.use_liger(lm, torch.device("cuda"), required=True)
    with pytest.raises(RediError, match="Liger does not know cohere2"):
        blocks.use_liger(lm, torch.device("cuda"), required=True)


# Liger's kernels in Triton's interpreter, which lacks what the first lines give it.
LIGER = """
import numpy, sys, tiny, torch, triton.language as tl, triton.runtime.interpreter as interpreter
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda
convert = interpreter._implicit_cvt
handle = lambda x: interpreter.TensorHandle(numpy.array([x], numpy.float32), tl.float32)
interpreter._implicit_cvt = (
    lambda x: tl.tensor(handle(x), tl.float32) if type(x) is float else convert(x))
libdevice.rsqrt = cuda.rsqrt = lambda x: 1.0 / tl.sqrt(x)
libdevice.tanh = cuda.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1

from redi.training import blocks
from redi.data.pack import pack_traces
from redi.data.tokenize import Trace
from redi.training.model import PackedLM

rng = numpy.random.default_rng(0)
traces = [Trace(rng.integers(0, 96, n).astype(numpy.int32), 2, True, n) for n in (9, 5, 7)]
def run(liger):
    lm = tiny.make_lm(sys.argv[1])
    if liger:
        blocks.use_liger(lm, torch.device("cuda"))
        names = {type(m).__name__ + str(m.forward) for m in lm.modules()}
        assert any("Liger" in name for name in names), names
    model = PackedLM(lm).train()
    model(pack_traces(traces, 99)[0], lambda x_TH, *_: x_TH.sin().sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
plain, fused = run(False), run(True)
print(float((fused - plain).norm() / plain.norm()), torch.equal(fused, plain))
"""


@pytest.mark.slow
@pytest.mark.linux
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_liger_computes_the_same(family):
    path = [*sys.path, str(Path(tiny.__file__).parent)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(
        [sys.executable, "-c", LIGER, family], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    error, equal = done.stdout.split()[-2:]
    assert float(error) < 5e-6
    assert equal == "False"  # other kernels did run


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(tmp_path):
    """Once for all blocks and packs: two graphs, no recompilation, no graph break."""
    import torch._dynamo

    plain, _ = gradient(tmp_path)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for checkpointing in ("none", "offload", "selective"):
        compiled, _ = gradient(tmp_path, torch_compile=True, gradient_checkpointing=checkpointing)
        assert (compiled - plain).norm() < 2e-6 * plain.norm()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
