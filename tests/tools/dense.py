"""Textbook losses of a causal LM on its full logits, one sequence at a time."""

import contextlib

import torch
import torch.nn.functional as F
from redi_kernels import modelcheck
from torch.nn.modules.module import register_module_forward_pre_hook


def logps(lm, ids: list[int], num_prompt_tokens: int):
    """Log-prob of each completion token; the whole [T, V] logits are built."""
    logits = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    logp = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
    return logp[num_prompt_tokens - 1 :]


def redi(lm, sequences: list[dict], alpha: float = 0.8):
    """REDI's loss of (input_ids, num_prompt_tokens, is_chosen), counts from all of `sequences`."""
    num_chosen = sum(s["is_chosen"] for s in sequences)
    num_rejected = len(sequences) - num_chosen
    loss = torch.zeros(())
    for s in sequences:
        weight = -1 / num_chosen if s["is_chosen"] else alpha / num_rejected
        loss = loss + weight * logps(lm, s["input_ids"], s["num_prompt_tokens"]).mean()
    return loss


def cross_entropy(lm, input_ids, labels, **inputs):
    """Mean over the labels that are not -100."""
    logits = lm(input_ids=input_ids, use_cache=False, **inputs).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def gradients(lm) -> dict[str, torch.Tensor]:
    """Of every parameter that has one; they are cleared."""
    grads = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    return grads


def sgd(lm, losses, lr: float) -> None:
    """One plain SGD step for each function in `losses`."""
    for loss in losses:
        loss().backward()
        with torch.no_grad():
            for p in lm.parameters():
                if p.grad is not None:
                    p -= lr * p.grad
        lm.zero_grad()


@contextlib.contextmanager
def no_logits(lm):
    """Fails when the head is called on more tokens than `patch` checks. A hook for all modules:
    `patch` refuses one on the head itself."""

    def stop(module, args):
        called = module is lm.lm_head and args[0].shape[:-1].numel() > modelcheck.LENGTH
        assert not called, "the head was called: full logits"

    hook = register_module_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def made_up_sequences(count: int = 11, vocab: int = 96) -> list[dict]:
    """Uneven lengths, 2 to 5 prompt tokens, about two right for each wrong one."""
    g = torch.Generator().manual_seed(5)
    sequences = []
    for i in range(count):
        length = int(torch.randint(8, 24, (), generator=g))
        sequences.append(
            {
                "input_ids": torch.randint(vocab, (length,), generator=g).tolist(),
                "num_prompt_tokens": 2 + i % 4,
                "is_chosen": i % 3 != 1,
            }
        )
    return sequences
