"""The host waits for the device once a step, however many micro-batches the step has."""

import traceback
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from redi.config import TrainConfig
from redi.recipe import make_config
from redi.training.distributed import Ranks
from redi.training.dpo_reference import with_reference
from redi.training.logging import TrainState
from redi.training.loop import Loop, load_data
from redi.training.model import load_model, load_tokenizer

# What hands numbers of the device to the host, or needs them to know a shape.
OPS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}
METHODS = {"item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__"}
CPU_ONLY = {"require", "_scaled"}


class Waits:
    """Counts them, but for those that `redi_kernels` has on a CPU only."""

    def __init__(self):
        self.seen = Counter()

    def note(self, name):
        frames = traceback.extract_stack()
        if not any(f.filename.endswith("/cpu.py") or f.name in CPU_ONLY for f in frames):
            self.seen[name] += 1


class Ops(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in OPS or (name == "index" and any(_is_mask(i) for i in args[1])):
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in METHODS:
            self.waits.note(func.__name__)
        return func(*args, **(kwargs or {}))


def _is_mask(index):
    return index is not None and index.dtype == torch.bool


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"gradient_checkpointing": "offload"},
        {"objective": "dpo"},
        {"objective": "simpo"},
        {"rejected_loss": "unlikelihood", "rejected_tokens": "diverging"},
    ],
    ids=lambda how: next(iter(how.values()), "redi"),
)
def test_a_step_waits_once(tmp_path, how, monkeypatch):
    settings = tiny.train_settings(tmp_path, train_batch_size=12, max_tokens_per_batch=30, **how)
    config = make_config(TrainConfig, settings, "test")
    data, model = load_data(config, load_tokenizer(config)), load_model(config)
    if config.objective == "dpo":
        traces = with_reference(data.traces, model, config, Ranks(0, 1, torch.device("cpu")))
        data = replace(data, traces=traces)
    loop = Loop(config, model, data, {}, Ranks(0, 1, torch.device("cpu")))
    assert len(loop.prepare(0).packs) > 10
    waits = Waits()
    # The modes do not see into the loss's operators, which would search for targets not counted.
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("searched"))
    with Ops(waits), Methods(waits):
        loop.step(TrainState(step=1, total_steps=2))  # no entropy is probed in this one
    loop.work.close()
    assert waits.seen == {"tolist": 1}
