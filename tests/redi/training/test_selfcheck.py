"""Right families are accepted, wrong ones refused or run one trace at a time, by the numbers."""

import json

import numpy as np
import pytest
import tiny
import torch
from redi_kernels import modelcheck
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM, Trainer

from redi.data.pack import pack_traces
from redi.data.tokenize import Trace
from redi.errors import RediError
from redi.recipe import make_config
from redi.training import attention, selfcheck
from redi.training.distributed import Ranks
from redi.training.logging import read_metrics
from redi.training.loop import Loop, TrainConfig, make_optimizer, train
from redi.training.model import (
    PackedLM,
    _drop_nothing,
    load_model,
    load_model_config,
    sequence_logps,
)

CPU = torch.device("cpu")
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
HYBRIDS = {  # what leaks, or what transformers itself refuses in a pack
    "jamba": {"pad_token_id": 0},
    "minimax": {"pad_token_id": 0},
    "recurrent_gemma": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 48, "pad_token_id": 0}


def build(family: str, **changes):
    """As transformers makes it: small weights, so that a fault must not need large ones."""
    settings = tiny.architecture(family, **changes)
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def recipe(folder, **changes) -> TrainConfig:
    return make_config(TrainConfig, tiny.train_settings(folder, **changes), "test")


def differences(model) -> tuple[float, float]:
    states = lambda ids, lengths: model(selfcheck.pack_of(ids, lengths), lambda x, *_: x)
    draw = lambda number, seed: modelcheck.draw_ids(model.lm, number, seed)
    dtype = torch.bfloat16 if model.autocast else None
    return modelcheck.mixing(states, model, draw, dtype=dtype)


@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in tiny.FAMILIES), ("mixtral", MOE),
     ("cohere", {"logit_scale": 0.3}), ("granite", {"logits_scaling": 2.5}),
     ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
     ("phimoe", MOE), ("llama4_text", LLAMA4)],
)  # fmt: skip
def test_right_families_are_accepted(family, changes):
    model = selfcheck.compare_with_own(build(family, **changes), PackedLM, CPU).train()
    assert selfcheck.check_packs(model) is None
    assert model.why_alone is None


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_right_families_are_accepted_in_bfloat16(family):
    model = PackedLM(build(family, **(MOE if family == "mixtral" else {})), autocast=True).train()
    difference, limit = differences(model)
    assert difference <= limit < 0.2
    assert selfcheck.check_packs(model) is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", HYBRIDS)
def test_what_mixes_traces_runs_one_at_a_time_and_is_right(family, autocast):
    lm = build(family, **HYBRIDS[family])
    model = selfcheck.compare_with_own(lm, PackedLM, CPU)
    model.autocast = autocast
    assert "in one pack its traces would change each other" in selfcheck.keep_apart(model, 96)
    model.autocast = False
    difference, limit = differences(model)  # now each by itself
    assert difference <= limit


def test_one_at_a_time_training_equals_packs_of_one(tmp_path):
    """The same run whatever fits in a pack, and pairs that must stay together."""
    for objective in ("redi", "simpo"):
        losses = []
        for size in (2, 96):
            folder = tmp_path / f"{objective}-{size}"
            changes = {"objective": objective, "max_tokens_per_batch": size, "max_steps": 2}
            architecture = tiny.architecture("lfm2", **HYBRIDS["lfm2"])
            train(tiny.train_settings(folder, architecture=architecture, **changes))
            rows = read_metrics(folder / "out" / "metrics.jsonl")
            losses.append([(row["loss"], row["grad_norm"]) for row in rows])
            assert [row["packs"] for row in rows] == [10 if objective == "redi" else 5] * 2
        assert losses[0] == losses[1]


def test_it_is_said(tmp_path, capsys):
    architecture = tiny.architecture("minimax", **HYBRIDS["minimax"])
    train(tiny.train_settings(tmp_path, architecture=architecture, max_steps=1))
    err = capsys.readouterr().err
    assert err.count("in one pack its traces would change each other") == 1
    assert err.count("without its routers' balancing loss") == 1


class Doubled(Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.01
        return out


class Capped(Qwen2ForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 50 * torch.tanh(out.logits / 50)
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


class ScaledHead(torch.nn.Linear):
    """As dory's: its weight is not all of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


def with_scaled_head():
    lm = build("qwen2")
    lm.lm_head = ScaledHead(lm.config.hidden_size, lm.config.vocab_size, bias=False)
    return lm


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Doubled(build("qwen2").config), "log-probs are off"),
        (lambda: Capped(build("qwen2").config), "log-probs are off"),  # 0.2 beside a cap of 50
        (with_scaled_head, "weight alone"),
        (lambda: build("bart", d_model=32, encoder_layers=2, decoder_layers=2), "own loss"),
        (lambda: build("mixtral", **MOE, output_router_logits=True), "own loss is"),
        (lambda: build("gpt_oss", **MOE), "own forward's"),
        (lambda: build("gemma3_text", use_bidirectional_attention=True), "own forward's"),
        (lambda: build("llama4_text", **LLAMA4, attention_chunk_size=16), "own forward's"),
    ],
    ids=["scale", "cap", "head", "bart", "router loss", "sinks", "bidirectional", "chunks"],
)
def test_what_is_computed_otherwise_is_refused(make, message):
    with pytest.raises(RediError, match=message):
        selfcheck.compare_with_own(make(), PackedLM, CPU)


def test_an_sdpa_that_leaves_something_out_does_not_condemn_the_model(monkeypatch):
    """As transformers 5.17's leaves out Gemma 2's cap: eager attention is the family's own word."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda *args, scaling, **kwargs: sdpa(*args, scaling=2 * scaling, **kwargs),
    )
    lm = build("qwen2")
    lm.set_attn_implementation("sdpa")
    packed = selfcheck.compare_with_own(lm, PackedLM, CPU)
    assert packed.lm.config._attn_implementation == attention.NAME


def test_a_cap_in_the_config_alone_is_refused():
    lm = build("qwen2")
    lm.config.final_logit_softcapping = 50.0
    with pytest.raises(RediError, match="log-probs are off"):
        selfcheck.compare_with_own(lm, PackedLM, CPU)


def test_nothing_of_it_stays(tmp_path):
    """The generators, the modes, the buffers, the gradients, the hooks."""
    lm = build("minimax", **HYBRIDS["minimax"]).train()
    lm.model.layers[0].eval()
    buffers = {name: buffer.clone() for name, buffer in lm.named_buffers()}
    modes, state = [m.training for m in lm.modules()], torch.get_rng_state()
    model = selfcheck.compare_with_own(lm, PackedLM, CPU)
    model.training = True
    selfcheck.check_packs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in lm.modules()] == modes
    assert all(torch.equal(buffers[name], buffer) for name, buffer in lm.named_buffers())
    assert all(p.grad is None for p in lm.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in lm.modules())
    outcomes = []
    for check in (True, False):
        train(tiny.train_settings(tmp_path / str(check), model_check=check, max_steps=2))
        rows = read_metrics(tmp_path / str(check) / "out" / "metrics.jsonl")
        outcomes.append([(row["loss"], row["grad_norm"]) for row in rows])
    assert outcomes[0] == outcomes[1]


def test_it_can_be_switched_off(tmp_path):
    architecture = tiny.architecture("gpt_oss", **MOE)
    with pytest.raises(RediError, match="model_check: false trains it all the same"):
        load_model(recipe(tmp_path, architecture=architecture))
    load_model(recipe(tmp_path, architecture=architecture, model_check=False))


COMPOSITE = {
    "model_type": "llama4",
    "text_config": {**tiny.BASE, **LLAMA4, "attention_chunk_size": 64, "attention_dropout": 0.5,
                    "floor_scale": 80},
    "vision_config": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
                      "intermediate_size": 16, "vision_output_dim": 16, "projector_dropout": 0.25},
}  # fmt: skip


def test_nested_configs_are_read_and_written(tmp_path):
    changes = {"max_position_embeddings": 1024, "rope_theta": 3e5, "max_length": 64}
    found = load_model_config(recipe(tmp_path, architecture=COMPOSITE, **changes))
    text = found.text_config
    assert text.max_position_embeddings == 1024
    assert 3e5 in (text.rope_parameters or {}).values()
    _drop_nothing(found)
    assert text.attention_dropout == found.vision_config.projector_dropout == 0.0
    with pytest.raises(RediError, match="chunks of 64 tokens"):
        selfcheck.refuse_untold(found, 65)
    selfcheck.refuse_untold(found, 64)
    assert "counts positions over the whole pack" in selfcheck.counts_over_packs(found, 80)
    assert selfcheck.counts_over_packs(found, 79) is None


def test_positions_of_a_nested_config_limit_the_traces(tmp_path):
    from starts import make_start, settings_for

    start = make_start(tmp_path / "start", "gemma3")
    file = start / "config.json"
    content = json.loads(file.read_text())
    content["text_config"]["max_position_embeddings"] = 20
    file.write_text(json.dumps(content))
    with pytest.raises(RediError, match=r"tokens in a trace, 20 positions in the model"):
        train(settings_for(start))


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_an_indexers_choice_is_refused_where_it_begins(family):
    """Below, it chooses all keys."""
    config = AutoConfig.for_model(family, index_topk=64)
    selfcheck.refuse_untold(config, 64)
    with pytest.raises(RediError, match="attends to the 64 keys that an indexer chooses"):
        selfcheck.refuse_untold(config, 65)


def test_packs_that_reach_where_positions_count_are_not_made():
    """Longer than the checks' own: nothing but the config tells."""
    lm = build("llama4_text", **LLAMA4, floor_scale=500, no_rope_layers=[0, 0, 0])
    model = selfcheck.compare_with_own(lm, PackedLM, CPU)
    assert selfcheck.keep_apart(model, 499) is None
    assert "counts positions over the whole pack" in selfcheck.keep_apart(model, 500, check=False)
    assert model.pack_size(500) == 1


def test_rope_of_each_kind_of_layer_is_read():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = build("gemma3_text").config
    config.rope_parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    config.max_position_embeddings = 64
    with pytest.raises(RediError, match="beyond 64 tokens its dynamic positions"):
        selfcheck.refuse_untold(config, 65)


def test_a_temperature_that_counts_over_the_pack_is_seen_where_it_is_short():
    lm = build("llama4_text", **LLAMA4, floor_scale=8, no_rope_layers=[0, 0, 0])
    model = selfcheck.compare_with_own(lm, PackedLM, CPU)
    assert "in one pack its traces would change" in selfcheck.check_packs(model)


def test_routers_balancing_loss_is_refused(tmp_path):
    for device in ("cpu", "meta"):
        architecture = tiny.architecture("mixtral", **MOE, output_router_logits=True)
        with pytest.raises(RediError, match="output_router_logits is on"):
            load_model(recipe(tmp_path, architecture=architecture), device=device)


def test_seq_idx_reaches_a_convolution_that_reads_it(monkeypatch):
    """As causal_conv1d's does: with it, packs are right; one that ignores it is found out."""
    from transformers.models.lfm2 import modeling_lfm2

    def convolve(x_1HT, weight_HK, bias=None, activation=None, seq_idx=None, **_):
        if seq_idx is None:
            seq_idx = torch.zeros(1, x_1HT.shape[-1])
        out = torch.zeros_like(x_1HT)
        for i in seq_idx.unique():
            here = (seq_idx == i)[:, None]
            padded = torch.nn.functional.pad(x_1HT * here, (weight_HK.shape[1] - 1, 0))
            conv = torch.nn.functional.conv1d(
                padded, weight_HK[:, None], bias, groups=x_1HT.shape[1]
            )
            out = torch.where(here, conv, out)
        return out

    model = PackedLM(build("lfm2", **HYBRIDS["lfm2"]))
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", convolve)
    assert selfcheck.check_packs(model) is None
    deaf = lambda *args, seq_idx=None, **more: convolve(*args, **more)
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", deaf)
    assert "hidden states differ" in selfcheck.check_packs(model)


def test_routers_that_draw_draw_alike_when_resumed(tmp_path):
    architecture = tiny.architecture("phimoe", **MOE)
    changes = {"architecture": architecture, "save_steps": 1, "max_steps": 3}

    class Stop:
        def on_step_end(self, state):
            if state.step == 2:
                raise SystemExit

    train(tiny.train_settings(tmp_path / "whole", **changes))
    with pytest.raises(SystemExit):
        train(tiny.train_settings(tmp_path / "cut", **changes), [Stop()])
    torch.manual_seed(123)
    train(tiny.train_settings(tmp_path / "cut", **changes))
    whole, cut = (read_metrics(tmp_path / n / "out" / "metrics.jsonl") for n in ("whole", "cut"))
    assert [row["loss"] for row in whole] == [row["loss"] for row in cut]


def test_noise_is_a_function_of_seed_step_and_rank():
    """What routers draw: the same whenever a step is done again, and never another's."""

    def drawn(seed, step, rank):
        loop = object.__new__(Loop)
        loop.config = TrainConfig(architecture={}, dataset_name="d", output_dir="o", seed=seed,
                                  tokenizer_name_or_path="t")  # fmt: skip
        loop.ranks = Ranks(rank, 2, torch.device("cpu"))
        torch.manual_seed(torch.seed())
        before = torch.get_rng_state()
        with loop.seeded(step):
            noise = torch.rand(4)
        assert torch.equal(torch.get_rng_state(), before)
        return tuple(noise.tolist())

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (11, 1, 1), (1, 11, 1)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(1, 2, 0) == drawn(1, 2, 0)


def test_a_family_without_checkpointing_says_so(tmp_path):
    architecture = tiny.architecture("jetmoe", **MOE)
    with pytest.raises(RediError, match="gradient_checkpointing: full: JetMoeForCausalLM does not"):
        load_model(recipe(tmp_path, architecture=architecture, gradient_checkpointing="full"))


def test_norms_that_are_matrices_do_not_decay(tmp_path):
    model = PackedLM(build("cohere", use_qk_norm=True))
    decayed, kept = (
        group["params"] for group in make_optimizer(model, recipe(tmp_path)).param_groups
    )
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert any(p.ndim == 2 for p in norms)
    assert {id(p) for p in norms} <= {id(p) for p in kept}
    assert all(p.ndim >= 2 for p in decayed)


@pytest.mark.parametrize("family", ["qwen2", "cohere", "recurrent_gemma", "gpt_oss"])
def test_what_decays_is_what_transformers_decays(tmp_path, family):
    """But for its vectors: biases of experts and of gates are matrices, and do not."""
    lm = build(family, **{"cohere": {"use_qk_norm": True}, "gpt_oss": MOE}.get(family, {}))
    (group, _) = make_optimizer(PackedLM(lm), recipe(tmp_path)).param_groups
    names = Trainer.get_decay_parameter_names(None, lm)
    theirs = {id(p) for name, p in lm.named_parameters() if name in names and p.ndim >= 2}
    assert {id(p) for p in group["params"]} == theirs


def test_a_scored_hybrid_is_scored_one_trace_at_a_time():
    lm = build("minimax", **HYBRIDS["minimax"])
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 96, n).astype(np.int32) for n in (9, 14, 5, 7)]
    traces = [Trace(x, 2, i % 2 == 0, i) for i, x in enumerate(ids)]
    model = selfcheck.compare_with_own(lm, PackedLM, CPU).eval()
    selfcheck.keep_apart(model, 1000)
    got = {}
    for pack, sum_S, _ in sequence_logps(model, pack_traces(traces, 1000)):
        got |= dict(zip(pack.examples, sum_S.tolist(), strict=True))
    want = {}
    for pack, sum_S, _ in sequence_logps(model, pack_traces(traces, 1)):
        want |= dict(zip(pack.examples, sum_S.tolist(), strict=True))
    assert got == want
