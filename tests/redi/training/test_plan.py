"""`redi plan`: what it foresees against what a real step allocates; whether it fits, what would."""

import re

import plan_check
import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from redi.config import TrainConfig
from redi.errors import RediError
from redi.recipe import load_config
from redi.training import attention, rehearsal
from redi.training.loop import train
from redi.training.model import load_model_config
from redi.training.plan import GIB, Planner, _memory, describe
from redi.training.throughput import model_flops


@pytest.mark.parametrize(
    "case",
    [("qwen3", 512, "selective, 3 kept", False), ("gemma2", 512, "full", False)],
    ids=lambda case: case[0],
)
def test_foreseen_within_a_tenth_of_counted(case):
    planned, counted = plan_check.check(case)
    assert planned == pytest.approx(counted, rel=plan_check.LIMIT)


@pytest.fixture(scope="module")
def paper(pytestconfig):
    file = pytestconfig.rootpath / "recipes" / "qwen-redi-1.5b-redi.yaml"
    changes = {"model_name_or_path": None, "tokenizer_name_or_path": "none"}
    return load_config(TrainConfig, file, changes)


def test_state_is_sixteen_bytes_a_parameter_over_all_gpus(paper):
    planner = Planner(paper)
    one, eight = planner.memory(1), planner.memory(8)
    assert one.state == 16 * 1_543_714_304
    assert eight.state == one.state / 8
    assert eight.activations == one.activations
    head, outer, block = 151936 * 1536, 151936 * 1536 + 1536, 46_797_824
    assert one.gathered == 2 * (outer + head) + 2 * (2 * 2 + 4) * block
    assert one.needed > one.peak > one.state + one.activations


def test_activations_grow_with_tokens_and_shrink_with_checkpointing(paper):
    planner = Planner(paper)

    def peak(checkpointing, tokens):
        change = {"gradient_checkpointing": checkpointing, "max_tokens_per_batch": tokens}
        variant = paper.model_copy(update=change | {"max_length": 16384})
        return planner.memory(8, variant).activations

    kinds = ("none", "selective", "full", "offload")
    none, selective, full, offload = (peak(kind, 32768) for kind in kinds)
    kept = 2 * 32768 * 1536  # a block's input in bf16, and attention's output
    assert offload == full - 26 * kept
    one_block = (none - full) / 27  # the last one's activations stay while the loss runs
    assert full + 27 * kept < selective < full + 28 * kept + one_block
    assert none > 8 * full
    # a block without checkpointing keeps about 34 H bytes a token, as is well known, and more here
    assert 34 * 1536 < (none - full) / 32768 / 28 < 80 * 1536
    assert peak("none", 65536) == pytest.approx(2 * none, rel=0.05)


def test_one_change_that_makes_it_fit(paper):
    planner = Planner(paper.model_copy(update={"gradient_checkpointing": "none"}))
    limit = 80e9
    assert planner.memory(8).needed > limit
    remedies = planner.remedies(8, limit)
    del remedies[2]  # max_tokens_per_batch: 19800
    for remedy, how in zip(remedies, ("selective", "full", "offload"), strict=True):
        memory = planner.memory(8, paper.model_copy(update={"gradient_checkpointing": how}))
        assert remedy == f"gradient_checkpointing: {how} ({memory.needed / GIB:.1f} GiB)"
        assert memory.needed <= limit
    assert not any("GPUs" in remedy for remedy in remedies)  # more of them hold as many tokens
    verdict = dict(_memory(planner, 8, 80))["  verdict"]
    assert verdict.startswith("DOES NOT FIT")
    assert remedies[0] in verdict


@pytest.mark.slow
def test_spare_memory_can_keep_blocks(paper):
    planner, limit = Planner(paper), 80e9
    kept = planner.kept_blocks(8, limit)
    assert 1 < kept < 28
    kept_by = lambda n: paper.model_copy(update={"kept_blocks": n})
    memory = planner.memory(8, kept_by(kept))
    assert memory.needed <= limit < planner.memory(8, kept_by(kept + 1)).needed
    room = f"room for kept_blocks: {kept} ({memory.needed / GIB:.1f} GiB)"
    assert room in dict(_memory(planner, 8, 80))["  verdict"]
    assert "room" not in dict(_memory(Planner(kept_by(kept)), 8, 80))["  verdict"]
    assert planner.kept_blocks(8, 1e15) == 28
    remedies = Planner(kept_by(28)).remedies(8, limit)
    assert remedies[0] == f"kept_blocks: {kept} ({memory.needed / GIB:.1f} GiB)"
    assert remedies[1].startswith("gradient_checkpointing: full, kept_blocks: 1 (")
    needs = [planner.memory(8, kept_by(n)).needed for n in (0, 1)]
    between = Planner(kept_by(0)), 8, sum(needs) / 2 / 1e9
    assert "room" not in dict(_memory(*between))["  verdict"]
    assert Planner(kept_by(1)).remedies(8, sum(needs) / 2)[0].startswith("kept_blocks: 0 (")


def test_text_says_whether_it_fits_and_how_long(paper):
    text = describe(paper, gpus=8, gpu_memory=80, mean_length=5000)
    assert "fits: " in text
    assert "1,662 of 32" in text
    assert "modelled: A100, 32% of its peak of 312 TFLOP/s, traces of 5,000 tokens as given" in text
    with pytest.raises(RediError, match="Z80"):
        describe(paper, gpu="Z80")


def test_time_is_the_work_over_what_the_cards_do(paper):
    def hours(*, gpus, gpu, **changes):
        config = paper.model_copy(update=changes)
        text = describe(config, gpus=gpus, gpu=gpu, mean_length=5000)
        return float(re.search(r"([\d.]+) hours", text)[1])

    work = 2 * 1662 * 32 * model_flops(Planner(paper).model.lm, [5000]) / 3600
    assert hours(gpus=1, gpu="A100") == pytest.approx(work / (0.32 * 312e12), abs=0.06)
    assert hours(gpus=2, gpu="H100") == pytest.approx(work / (0.32 * 2 * 989e12), abs=0.06)
    sft = hours(gpus=1, gpu="A100", objective="sft", gradient_checkpointing="none")
    assert sft == pytest.approx(work / 2 / (0.40 * 312e12), abs=0.06)
    mixed = 1 / 0.40 + 14 / 27 * (1 / 0.32 - 1 / 0.40)  # selective computes 27 of 28 again
    kept = hours(gpus=1, gpu="A100", kept_blocks=14)
    assert kept == pytest.approx(work * mixed / 312e12, abs=0.06)
    assert "traces of 6,600 tokens assumed: a third of max_length" in describe(paper)


def test_flash_attention_is_counted_as_it_keeps_and_uses():
    """out and a log-sum-exp a head beside q, k, v; in the backward dQ in float32 too, and dK and dV
    for every query head."""
    T, A, K, D = 256, 4, 2, 16
    sizes = ((1, T, heads, D) for heads in (A, K, K))
    with FakeTensorMode():
        qkv = [torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in sizes]
        with rehearsal.LiveBytes() as live:
            out, _ = torch.ops.redi.flash_attn_shapes(*qkv)
            kept = live.take()
            assert kept == 2 * T * A * D + 4 * T * A
            out.sum().backward()
            used = 4 * T * A * D + 4 * T * A + 2 * 2 * T * A * D
            assert live.take() - kept == pytest.approx(used + 2 * T * (A + 2 * K) * D, abs=64)


@pytest.mark.parametrize(
    "change", [{"rejected_floor": -4.6}, {"rejected_loss": "unlikelihood"}, {"loss_tolerance": 2.0}]
)
def test_the_recipes_own_loss_is_rehearsed(paper, change, monkeypatch):
    given = []
    make = rehearsal.make_objective
    monkeypatch.setattr(rehearsal, "make_objective", lambda c: given.append(c) or make(c))
    config = paper.model_copy(update={"objective": "redi", **change})
    assert "GiB" in describe(config, gpus=8, mean_length=5000) and given
    assert all(getattr(c, name) == value for c in given for name, value in change.items())


def test_gathered_weights_are_bfloat16_and_stay_tied(paper):
    with FakeTensorMode(allow_non_fake_inputs=True):
        kinds = ("full_attention",)
        lm = rehearsal._shallow(paper, load_model_config(paper), kinds, cuda=True).lm
        assert lm.lm_head.weight is lm.model.embed_tokens.weight
        assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}


def test_time_counts_the_forwards_of_a_reference(paper):
    def hours(**changes):
        rows = describe(paper.model_copy(update=changes), gpus=8, mean_length=5000).splitlines()
        return [float(x) for x in re.findall(r"([\d.]+) (?:hours|of them)", rows[-1])]

    (redi,), (dpo, reference) = hours(objective="redi"), hours(objective="dpo")
    epochs = paper.num_train_epochs  # a third of the FLOP, at 40% of the peak instead of 32%
    assert reference == pytest.approx(redi / epochs / 3 * 32 / 40, abs=0.06)
    assert dpo == pytest.approx(redi + reference, abs=0.06)


def test_planning_leaves_nothing_behind(tmp_path):
    """Shapes must not leak into a run in the same process."""
    settings = tiny.train_settings(tmp_path, max_steps=1)
    config = TrainConfig(**settings)
    for _ in range(2):
        assert "one CPU process" in describe(config, gpus=0)
        assert attention._rows_in_padded_batch.cache_info().currsize == 0
        train(settings | {"output_dir": str(tmp_path / "out")})
