"""Models come in unmodified, compute what transformers computes, and go out as they came."""

import numpy as np
import pytest
import tiny
import torch

from redi.config import TrainConfig
from redi.data.pack import pack_traces
from redi.data.tokenize import Trace
from redi.errors import RediError
from redi.recipe import make_config
from redi.training.model import PackedLM, bf16_note, load_model, sequence_logps


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

    from redi.training.loop import train

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


@pytest.mark.parametrize("can", [False, True])
def test_bf16_on_a_cpu_that_cannot_is_slow_and_it_is_said(tmp_path, monkeypatch, can):
    class Probe:
        _is_mkldnn_bf16_supported = staticmethod(lambda: can)

    monkeypatch.setattr(torch.ops, "mkldnn", Probe, raising=False)
    note = bf16_note(load_model(config(tmp_path, bf16=True)))
    assert (note is None) if can else ("bf16: true" in note and "float32" in note)
    assert bf16_note(load_model(config(tmp_path, bf16=False))) is None


def test_scratch_models_depend_on_the_seed_alone(tmp_path):
    def weights(seed):
        torch.manual_seed(1234 + seed)  # whatever ran before
        return load_model(config(tmp_path, seed=seed)).lm.lm_head.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_models_without_a_head_are_refused():
    with pytest.raises(RediError, match="causal LM"):
        PackedLM(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            {"model_type": "llama4_text", **tiny.BASE, "attention_chunk_size": 64,
             "num_local_experts": 2, "intermediate_size_mlp": 48},
            "attends in chunks of 64 tokens",
        ),
        (
            {"model_type": "phi3", **tiny.BASE, "pad_token_id": 0,
             "original_max_position_embeddings": 64,
             "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
                                 "original_max_position_embeddings": 64,
                                 "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
            "beyond 64 tokens its longrope positions change",
        ),
    ],
)  # fmt: skip
def test_families_that_packs_would_compute_wrong_are_refused(tmp_path, architecture, message):
    for device in ("cpu", "meta"):
        with pytest.raises(RediError, match=message):
            load_model(config(tmp_path, architecture=architecture), device=device)
    load_model(config(tmp_path, architecture=architecture, max_length=64), device="meta")


def test_a_named_models_own_config_is_used_where_weights_follow(tmp_path, monkeypatch):
    """A recipe's architecture stands in for it without them only: it may lack rope's scaling."""
    settings = config(tmp_path, model_name_or_path="some/hub-name")
    assert load_model(settings, device="meta").lm.config.vocab_size == tiny.BASE["vocab_size"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RediError, match=r"some/hub-name: no model could be loaded"):
        load_model(settings)


@pytest.mark.parametrize("start", ["scratch", "folder"])
def test_no_gpu_holds_a_whole_model(tmp_path, start):
    """Sharding moves it there, block by block."""
    settings = config(tmp_path, use_liger_kernel=False)
    if start == "folder":
        load_model(settings).lm.save_pretrained(tmp_path / "model")
        changes = {"architecture": None, "model_name_or_path": str(tmp_path / "model")}
        settings = settings.model_copy(update=changes)
    model = load_model(settings, device=torch.device("cuda"))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
