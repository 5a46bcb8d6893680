"""The reference is the root of trust: its gradients by finite differences, its values by hand."""

import math

import pytest
import torch
from redi_kernels import reference
from redi_kernels.head import Head

CU = torch.tensor([0, 3, 3, 7, 9])
IS_CHOSEN = torch.tensor([True, False, False, True])


def inputs() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(9, 4), (6, 4), (6,)]
    return [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]


Y = torch.tensor([-100, 2, 5, 0, -100, 1, 1, 3, 4])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap: float | None) -> None:
    def redi(x_TH, w_VH, bias):
        head = Head(bias, softcap, 0.7)
        return reference.redi_loss(x_TH, w_VH, Y, CU, IS_CHOSEN, head=head)

    def tokens(x_TH, w_VH, bias):
        return reference.token_logprobs(x_TH, w_VH, Y, Head(bias, softcap, 0.7))[:2]

    def sft(x_TH, w_VH, bias):
        return reference.sft_loss(x_TH, w_VH, Y, head=Head(bias, softcap, 0.7))

    for function in (redi, tokens, sft):
        assert torch.autograd.gradcheck(function, inputs())


def test_values_by_hand() -> None:
    """Two tokens of a vocabulary of two, logits (0, log 3): probabilities 1/4 and 3/4."""
    x_TH = torch.ones(2, 1, dtype=torch.float64)
    w_VH = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    y_T = torch.tensor([1, 0])
    logp_T, lse_T, entropy_T, correct_T = reference.token_logprobs(x_TH, w_VH, y_T)
    assert logp_T.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4)])
    assert lse_T.tolist() == pytest.approx([math.log(4)] * 2)
    assert entropy_T[0].item() == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert correct_T.tolist() == [True, False]
    cu_seqlens, is_chosen_S = torch.tensor([0, 1, 2]), torch.tensor([True, False])
    loss = reference.redi_loss(x_TH, w_VH, y_T, cu_seqlens, is_chosen_S, alpha=0.5)
    assert loss.item() == pytest.approx(-math.log(3 / 4) + 0.5 * math.log(1 / 4))
    gap = torch.tensor([2.0])
    assert reference.dpo_loss(gap, 0 * gap, 0 * gap, beta=0.5).item() == pytest.approx(
        math.log1p(math.exp(-1))
    )
    assert reference.simpo_loss(gap, 0 * gap, beta=0.5, gamma=1.0).item() == pytest.approx(
        math.log(2)
    )
