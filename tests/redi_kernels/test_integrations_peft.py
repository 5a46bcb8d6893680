"""LoRA: adapters get the dense loss's gradients, a frozen head costs nothing, LoRA on it speaks."""

import dense
import pytest
import tiny
import torch
from docs_code import run_section
from peft import LoraConfig, get_peft_model
from redi_kernels import cpu, redi_loss
from redi_kernels.hf import patch, unpatch


@pytest.fixture
def batch():
    ids = torch.randint(96, (2, 15), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.fixture
def needs(monkeypatch):
    """Which gradients (of x, of w, of the bias) the backend was asked for, call by call."""
    calls, weighted = [], cpu.weighted

    def recording(*args):
        if any(args[-1]):  # not patch's own check, which asks for none
            calls.append(tuple(args[-1]))
        return weighted(*args)

    monkeypatch.setattr(cpu, "weighted", recording)
    return calls


def with_lora(*target_modules, seed=0, **settings):
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=[*target_modules], r=4, init_lora_weights=False, **settings)
    return get_peft_model(tiny.make_lm(), config).eval()


def assert_gradients_of_dense(model, batch):
    """Ours, through the patch, and the textbook's on the same model; returns ours."""
    patch(model)
    with dense.no_logits(model.get_base_model()):
        loss = model(**batch).loss
    loss.backward()
    ours = dense.gradients(model)
    theirs = dense.cross_entropy(model, **batch)
    theirs.backward()
    expected = dense.gradients(model)
    torch.testing.assert_close(loss, theirs)
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, atol=2e-6, rtol=2e-4, msg=name)
    return ours


def test_adapters_get_the_dense_gradients_and_the_head_no_work(batch, needs):
    ours = assert_gradients_of_dense(with_lora("q_proj", "down_proj"), batch)
    assert len(ours) == 12 and all("lora_" in n and g.any() for n, g in ours.items())
    assert needs == [(True, False, False)]


def test_the_page_runs(batch):
    names = {"model": tiny.make_lm(), "ids": batch["input_ids"], "labels": batch["labels"]}
    model = run_section("integrations.md", "LoRA (peft)", **names)["model"]
    assert all(("lora_" in n) == (p.grad is not None) for n, p in model.named_parameters())


def test_patched_first_and_redi_through_loss_fn(needs):
    lm = patch(tiny.make_lm())
    config = LoraConfig(target_modules=["v_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(lm, config).eval()
    sequences = dense.made_up_sequences(5)
    p = run_section("integrations.md", "A plain PyTorch loop")["pack"](sequences)
    args = p.pop("targets"), p.pop("cu_seqlens"), p.pop("is_chosen")
    model(**p, loss_fn=lambda x, head: head(redi_loss, x[0], *args)).loss.backward()
    ours = dense.gradients(model)
    dense.redi(model, sequences).backward()
    expected = dense.gradients(model)
    assert needs == [(True, False, False)] and len(ours) == len(expected) == 6
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, atol=2e-6, rtol=2e-4, msg=name)


def test_lora_on_the_head_says_what_to_do(batch):
    model = with_lora("q_proj", "lm_head")
    with pytest.raises(TypeError, match=r"target_modules.*modules_to_save.*merge_and_unload"):
        patch(model)
    lm = patch(tiny.make_lm())  # or when it comes after the patch
    torch.manual_seed(0)
    model = get_peft_model(lm, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(TypeError, match="merge_and_unload"):
        model(**batch)
    merged = unpatch(model).merge_and_unload()
    theirs = dense.cross_entropy(merged, **batch)
    assert theirs != dense.cross_entropy(tiny.make_lm(), **batch)
    torch.testing.assert_close(patch(merged)(**batch).loss, theirs)


def test_a_whole_head_trained_by_peft(batch, needs):
    model = with_lora("q_proj", modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.mul_(1.5)
    ours = assert_gradients_of_dense(model, batch)
    assert needs == [(True, True, False)]
    assert any("modules_to_save.default.weight" in name for name in ours)
    with model.disable_adapter():
        loss = model(**batch).loss
    torch.testing.assert_close(loss, dense.cross_entropy(tiny.make_lm(), **batch))
