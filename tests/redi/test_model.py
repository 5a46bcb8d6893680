"""Models come in unmodified, compute what transformers computes, and go out as they came."""

import numpy as np
import pytest
import tiny
import torch

from redi.config import TrainConfig
from redi.data.pack import pack_traces
from redi.data.tokenize import Trace
from redi.errors import RediError
from redi.model import PackedLM, load_model, sequence_logps
from redi.recipe import make_config


def traces(count: int = 5) -> list[Trace]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 20, count)
    ids = [rng.integers(0, 96, n).astype(np.int32) for n in lengths]
    return [Trace(x, 2, i % 2 == 0, i) for i, x in enumerate(ids)]


def textbook(lm, trace: Trace) -> float:
    """Summed log-prob of a trace's completion, from transformers' own logits, alone and eager."""
    lm.set_attn_implementation("eager")
    ids = torch.from_numpy(trace.input_ids).long()
    logps = lm(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
    where = torch.arange(trace.num_prompt_tokens, len(ids))
    return logps[where - 1, ids[where]].sum().item()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logps_are_those_of_transformers_logits(family):
    """Soft caps, scales and biases of the head included."""
    lm = tiny.make_lm(family)
    want = {trace.example: textbook(lm, trace) for trace in traces()}
    got = {}
    for pack, sum_S, length_S in sequence_logps(PackedLM(lm), pack_traces(traces(), 30)):
        got |= dict(zip(pack.examples, sum_S.tolist(), strict=True))
        assert length_S.tolist() == [n - 2 for n in pack.seqlens]
    assert got == pytest.approx(want, rel=2e-5)


def config(folder, **changes) -> TrainConfig:
    return make_config(TrainConfig, tiny.train_settings(folder, **changes), "test")


def test_overrides_reach_the_model_and_its_export(tmp_path):
    import json

    from redi.train import train

    changes = {"rope_theta": 3e5, "max_position_embeddings": 1024}
    model = load_model(config(tmp_path, **changes))
    assert model.lm.config.max_position_embeddings == 1024
    frequencies = model.lm.model.rotary_emb.inv_freq
    assert frequencies[1] / frequencies[0] == pytest.approx(3e5 ** (-2 / 8))
    train(config(tmp_path, max_steps=1, **changes))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["max_position_embeddings"] == 1024
    assert 3e5 in (
        written.get("rope_theta"),
        (written.get("rope_parameters") or {}).get("rope_theta"),
    )


def test_dropout_is_off(tmp_path):
    architecture = tiny.architecture(attention_dropout=0.5)
    model = load_model(config(tmp_path, architecture=architecture))
    assert model.training
    assert model.lm.config.attention_dropout == 0.0


def test_bf16_on_a_cpu_computes_in_bfloat16_over_float32_weights(tmp_path):
    exact, half = (load_model(config(tmp_path, bf16=bf16)) for bf16 in (False, True))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    packs = pack_traces(traces(), 1000)
    ((_, want, _),) = sequence_logps(exact, packs)
    ((_, got, _),) = sequence_logps(half, packs)
    assert 1e-6 < (got - want).abs().max() / want.abs().max() < 2e-2


def test_scratch_models_depend_on_the_seed_alone(tmp_path):
    def weights(seed):
        torch.manual_seed(1234 + seed)  # whatever ran before
        return load_model(config(tmp_path, seed=seed)).lm.lm_head.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_models_without_a_head_are_refused():
    with pytest.raises(RediError, match="causal LM"):
        PackedLM(torch.nn.Linear(2, 2))
