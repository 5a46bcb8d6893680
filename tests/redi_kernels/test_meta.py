"""The checker is checked: it accepts the dense implementation and rejects every planted fault."""

import pytest
import torch
from gradcheck_tools import check, complaints, faults, make_problem, textbook

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peak", [1.0, 4.0])
@pytest.mark.parametrize("bias", [False, True])
def test_every_planted_fault_is_found(dtype: torch.dtype, peak: float, bias: bool) -> None:
    problem = make_problem(200, 517, 64, dtype, peak=peak, bias=bias)
    right = textbook(problem)
    check(problem, right)
    missed = [name for name, wrong in faults(problem, right) if not complaints(problem, wrong)]
    assert not missed
