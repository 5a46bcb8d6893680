"""Empty and degenerate batches, and inputs that do not fit together."""

import sys
from typing import Any

import pytest
import torch
from redi_kernels import (
    dpo_loss,
    redi_loss,
    sequence_logprobs,
    sft_loss,
    simpo_loss,
    token_logprobs,
)

V, H = 11, 6


def batch(lengths: list[int], valid: bool = True) -> dict[str, Any]:
    T = sum(lengths)
    return {
        "x_TH": torch.randn(T, H, requires_grad=True),
        "w_VH": torch.randn(V, H, requires_grad=True),
        "y_T": torch.randint(V, (T,)) if valid else torch.full((T,), -100),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "is_chosen_S": torch.arange(len(lengths)) % 2 == 0,
    }


@pytest.mark.parametrize("lengths", [[], [0], [3, 4], [0, 5, 0]])
@pytest.mark.parametrize("loss", ["redi", "sft", "primitive"])
def test_nothing_to_learn_is_a_zero_loss_with_zero_gradients(lengths, loss) -> None:
    b = batch(lengths, valid=False)
    x_TH, w_VH, y_T = b["x_TH"], b["w_VH"], b["y_T"]
    if loss == "redi":
        value = redi_loss(**b).loss
    elif loss == "sft":
        value = sft_loss(x_TH, w_VH, y_T, b["cu_seqlens"]).loss
    else:
        out = token_logprobs(x_TH, w_VH, y_T)
        value = out.logp_T.sum() + out.lse_T.sum()
        assert not out.entropy_T.any() and not out.correct_T.any()
    value.backward()
    assert value.item() == 0
    assert x_TH.grad.shape == x_TH.shape and not x_TH.grad.any()
    assert w_VH.grad.shape == w_VH.shape and not w_VH.grad.any()


def test_one_token() -> None:
    b = batch([1])
    out = redi_loss(**b)
    want = torch.nn.functional.cross_entropy(b["x_TH"] @ b["w_VH"].T, b["y_T"])
    torch.testing.assert_close(out.loss, want)
    assert out.lengths_S.tolist() == [1]


def test_a_sequence_without_valid_tokens_counts_but_adds_nothing() -> None:
    b = batch([4, 4, 4])
    b["is_chosen_S"][:] = True
    b["y_T"][4:8] = -100
    out = redi_loss(**b)
    alone = sum(
        torch.nn.functional.cross_entropy(b["x_TH"][r] @ b["w_VH"].T, b["y_T"][r])
        for r in (slice(0, 4), slice(8, 12))
    )
    torch.testing.assert_close(out.loss, alone / 3)
    assert out.lengths_S.tolist() == [4, 0, 4] and out.logps_S[1] == 0


def test_vocabulary_of_one_is_certain() -> None:
    x_TH = torch.randn(5, H, requires_grad=True)
    w_VH = torch.randn(1, H, requires_grad=True)
    out = token_logprobs(x_TH, w_VH, torch.zeros(5, dtype=torch.long))
    out.logp_T.sum().backward()
    assert not out.logp_T.any() and not x_TH.grad.any() and not w_VH.grad.any()
    assert out.correct_T.all()


def test_sequence_logprobs_needs_targets_only_for_lengths() -> None:
    logp_T = torch.tensor([-1.0, -2.0, 0.0, -4.0])
    y_T = torch.tensor([1, 1, -100, 1])
    cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
    out = sequence_logprobs(logp_T, cu_seqlens, y_T)
    assert out.sum_S.tolist() == [-3, -4] and out.length_S.tolist() == [2, 1]
    assert out.mean_S.tolist() == [-1.5, -4]
    assert sequence_logprobs(logp_T, cu_seqlens).length_S.tolist() == [2, 2]


class Sharded(torch.Tensor):
    """Looks like a DTensor, which has a device mesh."""

    device_mesh = None


BAD = [
    ("x_TH must be", {"x_TH": torch.zeros(8, 1, H)}),
    ("w_VH must be .* shard", {"w_VH": torch.zeros(V * H)}),
    ("w_VH must be .* shard", {"w_VH": torch.zeros(0, H)}),
    ("w_VH must be", {"w_VH": torch.zeros(V, H + 1)}),
    ("y_T must be", {"y_T": torch.zeros(8)}),
    ("y_T must be", {"y_T": torch.zeros(7, dtype=torch.long)}),
    ("targets outside", {"y_T": torch.full((8,), V)}),
    ("targets outside", {"y_T": torch.full((8,), -1)}),
    ("targets outside", {"ignore_index": -1, "y_T": torch.full((8,), -100)}),
    ("bias must be", {"bias": torch.zeros(V + 1)}),
    ("softcap must be", {"softcap": 0.0}),
    ("tolerance must be", {"tolerance": -1.0}),
    ("tolerance must be", {"tolerance": float("nan")}),
    ("tolerance=1.0: fast mode is for", {"tolerance": 1.0, "backend": "reference"}),
    (
        "tolerance=1.0: fast mode is for",
        {"tolerance": 1.0, "x_TH": torch.zeros(8, H).half(), "w_VH": torch.zeros(V, H).half()},
    ),
    ("backend must be", {"backend": "cuda"}),
    ("is on meta", {"w_VH": torch.zeros(V, H, device="meta")}),
    ("cast one of them", {"w_VH": torch.zeros(V, H, dtype=torch.bfloat16)}),
    ("one of fp16", {"x_TH": torch.zeros(8, H).int(), "w_VH": torch.zeros(V, H).int()}),
    ("is a DTensor", {"w_VH": torch.zeros(V, H).as_subclass(Sharded)}),
    ("cu_seqlens must be integers", {"cu_seqlens": torch.tensor([0.0, 8.0])}),
    ("cu_seqlens must be integers", {"cu_seqlens": torch.tensor([], dtype=torch.int32)}),
    ("cu_seqlens must start at 0", {"cu_seqlens": torch.tensor([0, 3, 7])}),
    ("cu_seqlens must start at 0", {"cu_seqlens": torch.tensor([1, 3, 8])}),
    ("cu_seqlens must start at 0", {"cu_seqlens": torch.tensor([0, 9, 8])}),
    ("is_chosen_S must be", {"is_chosen_S": torch.tensor([True])}),
    ("is_chosen_S must be", {"is_chosen_S": torch.tensor([1, 0])}),
    ("num_chosen must be positive", {"num_chosen": 0}),
]  # fmt: skip


@pytest.mark.parametrize("value", ["1", 1.0, True, None])
@pytest.mark.parametrize("loss", ["redi", "sft", "dpo", "simpo", "primitive"])
def test_an_ignored_target_is_an_integer(loss: str, value: Any) -> None:
    inputs = list(batch([3, 5]).values())
    calls = {
        "redi": lambda **options: redi_loss(*inputs, **options),
        "sft": lambda **options: sft_loss(*inputs[:3], **options),
        "dpo": lambda **options: dpo_loss(*inputs, torch.zeros(2), **options),
        "simpo": lambda **options: simpo_loss(*inputs, **options),
        "primitive": lambda **options: token_logprobs(*inputs[:3], **options),
    }
    with pytest.raises(TypeError, match="ignore_index must be an integer"):
        calls[loss](ignore_index=value)


@pytest.mark.parametrize(("message", "change"), BAD, ids=[m for m, _ in BAD])
def test_inputs_that_do_not_fit_are_refused(message: str, change: dict[str, Any]) -> None:
    good = batch([3, 5])
    redi_loss(**good)
    with pytest.raises((ValueError, TypeError), match=message):
        redi_loss(**(good | change))


def test_import_needs_neither_triton_nor_transformers() -> None:
    import subprocess

    code = (
        "import sys, redi_kernels; "
        "print([m for m in ('triton', 'transformers', 'redi') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
