"""Each question that a model is asked finds what no other would, and no more than there is."""

import pytest
import tiny
import torch
from redi_kernels import modelcheck
from redi_kernels.hf import patch
from torch import nn
from transformers import Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

H = 16
EMBEDDING = torch.randn(400, H, generator=torch.Generator().manual_seed(0))


def own_states(ids_T, lengths):
    """Of each trace by itself: running means of its tokens' embeddings."""
    traces = EMBEDDING[ids_T].split(lengths)
    return torch.cat([z.cumsum(0) / torch.arange(1, len(z) + 1)[:, None] for z in traces])


def starts(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths))]


def swap_alone(x_TH, ids_T, lengths, training):
    """A state left over, in training only."""
    for start in starts(lengths)[1:] if training else []:
        x_TH[start] += 0.01 * EMBEDDING[ids_T[start - 1]]


def alone_and_order(x_TH, ids_T, lengths, training):
    """Positions counted over the pack: what the tokens before are is nothing to it."""
    x_TH += 0.01 * torch.arange(len(x_TH))[:, None]


def order_alone(x_TH, ids_T, lengths, training):
    """The middle trace only: a boundary that is off where another one follows."""
    if len(lengths) > 2:
        x_TH[lengths[0]] += 0.01 * EMBEDDING[ids_T[lengths[0] - 1]]


def ahead(x_TH, ids_T, lengths, training):
    """What comes after."""
    for start in starts(lengths)[1:]:
        x_TH[start - 1] += EMBEDDING[ids_T[start]]


def no_number(x_TH, ids_T, lengths, training):
    x_TH[-1, 0] = float("nan")


def rounding(x_TH, ids_T, lengths, training):
    x_TH *= 1 + 1e-6 * len(lengths)


def first_tokens(x_TH, ids_T, lengths, training):
    """A state that is forgotten soon: within a median of the whole trace it would not show."""
    for start in starts(lengths)[1:]:
        x_TH[start : start + 3] += 0.3 * EMBEDDING[ids_T[start - 1]]


def another_expert(x_TH, ids_T, lengths, training):
    """A token or two that rounding sends elsewhere, in whatever comes second or third."""
    for start in starts(lengths)[1:]:
        x_TH[start + 8] *= 2


@pytest.mark.parametrize(
    ("leak", "dtype", "finds"),
    [
        *((leak, None, True)
          for leak in (swap_alone, alone_and_order, order_alone, ahead, no_number)),
        (rounding, None, False), (first_tokens, torch.bfloat16, True),
        (another_expert, torch.bfloat16, False), (another_expert, None, True),
    ],
)  # fmt: skip
def test_every_leak_is_found_by_some_question(leak, dtype, finds):
    module = nn.Linear(1, 1).train()

    def states(ids_T, lengths):
        x_TH = own_states(ids_T, lengths)
        leak(x_TH, ids_T, lengths, module.training)
        return x_TH

    def draw(number, seed):
        return torch.randint(400, (number,), generator=torch.Generator().manual_seed(seed))

    difference, limit = modelcheck.mixing(states, module, draw, dtype=dtype)
    assert (not difference <= limit) == finds


def test_buffers_that_a_forward_changes_are_put_back():
    """As running statistics, or frequencies that grow with the longest sequence."""
    module = nn.BatchNorm1d(H).train()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    states = lambda ids_T, lengths: module(EMBEDDING[ids_T])
    modelcheck.mixing(states, module, lambda number, seed: torch.arange(number) + seed)
    assert module.training
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())


class Learned(Qwen2ForCausalLM):
    """With parameters of its own that do nothing yet."""

    def __init__(self, config):
        super().__init__(config)
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(96))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.learned(out.logits)
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
        return out

    def learned(self, logits):
        return logits


class LearnedScale(Learned):
    def learned(self, logits):
        return logits * self.scale


class LearnedBias(Learned):
    def learned(self, logits):
        return logits + self.bias


def test_a_parameter_that_would_get_no_gradient_is_found():
    """It changes nothing where it starts; training would leave it there, in silence."""
    config = tiny.make_lm().config
    for kind, name in ((LearnedScale, "scale"), (LearnedBias, "bias")):
        lm = kind(config)
        before = {name: p.clone() for name, p in lm.named_parameters()}
        with pytest.raises(ValueError, match="neither its base model's nor lm_head's"):
            patch(lm)
        assert all(torch.equal(before[name], p) for name, p in lm.named_parameters()), name
    patch(Learned(config))  # its own are of no use: nothing is lost


class Uncalled(Qwen2ForCausalLM):
    """Its logits, but not its loss, are scaled; and it reads lm_head's weight without a call."""

    def forward(self, input_ids, labels=None, **_):
        x_BTH = self.model(input_ids, use_cache=False).last_hidden_state
        logits, loss = nn.functional.linear(x_BTH, self.lm_head.weight), None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits * 1.01)


def test_logits_are_compared_where_the_head_is_not_called():
    with pytest.raises(ValueError, match="log-probs are off"):
        patch(Uncalled(tiny.make_lm().config))


def test_weights_that_are_no_numbers_are_named():
    lm = tiny.make_lm()
    lm.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weight model.layers.1.mlp.up_proj.weight holds NaN"):
        patch(lm)


class Masked(Qwen2ForCausalLM):
    """Rows of a padded vocabulary are ruled out; the others are a little more than lm_head's."""

    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.002
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


def test_a_row_at_minus_infinity_hides_nothing():
    """It is no size, of which rounding would be a share."""
    for kind in (Qwen2ForCausalLM, Masked):
        lm = kind(tiny.make_lm().config)
        lm.lm_head.bias = nn.Parameter(torch.zeros(96))
        lm.lm_head.bias.data[48:] = -float("inf")
        if kind is Masked:
            with pytest.raises(ValueError, match=r"Masked: its own loss is \d"):
                patch(lm)
        else:
            patch(lm)
