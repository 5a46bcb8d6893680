"""Sampling draws from exactly the distribution transformers defines; batching changes no sample."""

import pytest
import torch
from tiny import make_lm
from transformers import LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from redi.evaluation.generate import NUCLEUS_GUESS, NotNumbers, generate, sample_tokens

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21], [5, 6, 7, 8, 9, 10, 11, 12, 13], [30] * 5]


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])  # 0.01: nearly uniform, a nucleus of hundreds
@pytest.mark.parametrize("num_tokens", [20, 2 * NUCLEUS_GUESS])
@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.6, 0.95), (1.3, 0.5), (1.0, 1.0), (1.0, 1e-6)]
)
def test_distribution_is_that_of_transformers(num_tokens, spread, temperature, top_p):
    torch.manual_seed(0)
    logits_1V = spread * torch.randn(1, num_tokens)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    expected_V = warpers(None, logits_1V).softmax(-1)[0]

    grid = 5_000  # sweeping the uniform draw gives each token its probability, to 1/grid
    uniform_N = (torch.arange(grid) + 0.5) / grid
    drawn_N = sample_tokens(logits_1V.expand(grid, -1), uniform_N, temperature, top_p)
    share_V = torch.bincount(drawn_N, minlength=num_tokens) / grid

    assert (share_V - expected_V).abs().max() < 2 / grid
    assert (share_V[expected_V == 0] == 0).all()


def test_each_row_has_its_own_draw_and_extremes_stay_inside():
    logits_NV = torch.tensor([[0.0, 0.0, -50.0]]).expand(4, -1)
    almost_one = 1 - 2**-24  # the largest float32 draw
    drawn = sample_tokens(logits_NV, torch.tensor([0.0, 0.4, 0.6, almost_one]), 1.0, 1.0)
    assert set(drawn[:2].tolist()) == {int(drawn[0])}
    assert set(drawn[2:].tolist()) == {1 - int(drawn[0])}


def test_temperature_zero_is_greedy():
    logits_NV = torch.randn(7, 30)
    drawn = sample_tokens(logits_NV, torch.rand(7), 0, 0.95)
    assert drawn.equal(logits_NV.argmax(-1))


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3_text", "mistral"])
def test_greedy_batch_equals_transformers_one_by_one(family):
    """Left padding, shared prefill, rows leaving the batch: none shows, sliding windows or not."""
    lm = make_lm(family, seed=3)
    draws = torch.zeros(4, 24)
    endless = generate(lm, PROMPTS, draws, stop_ids=[99], temperature=0, top_p=1)
    stop_ids = [endless[0][3]]  # so that the first prompt ends early
    got = generate(lm, PROMPTS, draws, stop_ids=stop_ids, temperature=0, top_p=1)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = lm.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
            eos_token_id=stop_ids, pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    assert got == expected
    assert len({len(completion) for completion in got}) > 1  # they ended at different steps


def test_a_sample_does_not_depend_on_its_neighbours():
    lm = make_lm("qwen2", scale=3.0)
    prompts = PROMPTS * 5
    uniform_NT = torch.rand(len(prompts), 30, generator=torch.Generator().manual_seed(1))
    options = {"stop_ids": [1, 2, 3, 4, 5, 6], "temperature": 1.0, "top_p": 0.95}
    together = generate(lm, prompts, uniform_NT, **options)
    alone = [
        generate(lm, [prompt], uniform_NT[i : i + 1], **options)[0]
        for i, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert together[0] != together[2]  # the same prompt, other draws


def test_completions_end_with_the_first_stop_or_at_the_limit():
    lm = make_lm("qwen2", scale=2.0)
    stop_ids = {1, 2, 3, 4}
    torch.manual_seed(0)
    heard = []
    completions = generate(
        lm, [[7, 8]] * 40, torch.rand(40, 20), stop_ids=stop_ids, temperature=1.0, top_p=1.0,
        on_finished=heard.append,
    )  # fmt: skip
    assert sum(heard) == 40 and len(heard) > 2
    finished = [c[-1] in stop_ids for c in completions]
    assert any(finished) and not all(finished)
    for completion, is_finished in zip(completions, finished, strict=True):
        assert not stop_ids & set(completion[:-1])
        assert is_finished or len(completion) == 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_not_sampled_from(bad):
    lm = make_lm("llama")
    options = {"stop_ids": [1], "temperature": 0.6, "top_p": 0.95}
    uniform_NT = torch.full((2, 3), 0.5)
    lm.lm_head.weight.data[7] = bad
    with pytest.raises(NotNumbers) as raised:
        generate(lm, PROMPTS[:2], uniform_NT, **options)
    assert (raised.value.prompt, raised.value.num_tokens) == (0, 0)
