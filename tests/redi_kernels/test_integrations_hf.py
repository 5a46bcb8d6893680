"""A plain loop and the patched transformers model, against textbook losses on full logits."""

import copy
from itertools import chain

import dense
import pytest
import tiny
import torch
import torch.distributed as dist
from docs_code import run_section
from redi_kernels import redi_loss
from redi_kernels.hf import logit_options, patch, unpatch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

PAGE = "integrations.md"
SHAPED = {  # families that do something to their logits, each with a setting that matters
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 2.5},
    "phi": {"tie_word_embeddings": False},  # has a bias
}


@pytest.fixture
def batch():
    """ids [3, 17] and labels with a masked prompt and a padded tail."""
    ids = torch.randint(96, (3, 17), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 11:] = -100
    return {"input_ids": ids, "labels": labels}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=2e-6, rtol=2e-4, msg=name)


def make_shaped(family: str):
    settings = {**tiny.BASE, **SHAPED[family]}
    if family == "phi":
        settings["num_key_value_heads"] = 4
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(20)
        if family == "phi":
            lm.lm_head.bias.normal_()
    return lm.eval()


def test_plain_loop_on_packs_equals_dense_steps_on_single_sequences():
    lm, reference = tiny.make_lm(), tiny.make_lm()
    sequences = dense.made_up_sequences()
    steps = [[sequences[:2], sequences[2:5]], [sequences[5:9], sequences[9:10], sequences[10:]]]
    page = run_section(PAGE, "A plain PyTorch loop")
    packs = [[page["pack"](s) for s in step] for step in steps]
    with dense.no_logits(lm):
        page["train"](lm, torch.optim.SGD(lm.parameters(), lr=0.05), packs)
    losses = [lambda s=step: dense.redi(reference, [*chain(*s)]) for step in steps]
    dense.sgd(reference, losses, lr=0.05)
    moved = (lm.lm_head.weight - tiny.make_lm().lm_head.weight).abs().max()
    assert moved > 1e-3
    for ours, theirs in zip(lm.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_page_on_patching_runs(batch):
    lm = tiny.make_lm()
    own = dense.cross_entropy(lm, batch["input_ids"], batch["labels"])
    ids = batch["input_ids"]
    page = run_section(PAGE, "A transformers model", model=lm, ids=ids, labels=batch["labels"])
    torch.testing.assert_close(page["loss"], own)
    torch.testing.assert_close(page["hidden"], lm.model(ids).last_hidden_state)
    assert page["text"].shape == (3, 21)


@pytest.mark.parametrize("family", ["qwen2", "llama", *SHAPED])
@pytest.mark.parametrize("num_items", [None, 50])
def test_loss_and_gradients_equal_the_dense_ones(family, num_items, batch):
    lm = make_shaped(family) if family in SHAPED else tiny.make_lm(family)
    theirs = dense.cross_entropy(lm, **batch)
    if num_items is not None:
        theirs = theirs * (batch["labels"][:, 1:] != -100).sum() / num_items
    theirs.backward()
    expected = dense.gradients(lm)
    patch(lm)
    given = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    with dense.no_logits(lm):
        out = lm(**batch, **given)
        out.loss.backward()
    assert out.logits is None
    torch.testing.assert_close(out.loss, theirs)
    assert_same_gradients(dense.gradients(lm), expected)


def test_shaped_families_are_shaped():
    """Or the test above would not notice a lost option."""
    for family in ("gemma2", "cohere", "granite"):
        assert logit_options(make_shaped(family).config) != {"softcap": None, "logit_scale": 1.0}
    assert make_shaped("phi").lm_head.bias.abs().max() > 1


def test_all_ways_to_say_it_agree(batch):
    lm = patch(tiny.make_lm())
    ids, labels = batch["input_ids"], batch["labels"]
    loss = lm(**batch).loss
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    zeros = labels.masked_fill(labels == -100, 0)  # 0 may also be a label: compare with itself
    ignored = tiny.make_lm()(input_ids=ids, labels=zeros, ignore_index=0).loss
    assert lm(input_ids=ids, shift_labels=shifted).loss == loss
    assert lm(ids, None, None, None, None, labels).loss == loss  # all by position
    assert lm(**batch, return_dict=False)[0] == loss
    assert lm(**batch, output_hidden_states=True).hidden_states[-1].shape == (3, 17, 32)
    torch.testing.assert_close(lm(input_ids=ids, labels=zeros, ignore_index=0).loss, ignored)
    assert lm(input_ids=ids, labels=torch.full_like(ids, -100)).loss == 0


def test_loss_fn_gives_redi_on_the_models_own_head(batch):
    lm = patch(make_shaped("gemma2"))
    sequences = dense.made_up_sequences(5)
    page = run_section(PAGE, "A plain PyTorch loop")
    pack = page["pack"](sequences)
    args = pack["targets"], pack["cu_seqlens"], pack["is_chosen"]
    ids = {name: pack[name] for name in ("input_ids", "position_ids")}
    with dense.no_logits(lm):
        out = lm(**ids, loss_fn=lambda x, head: head(redi_loss, x[0], *args, alpha=0.3))
    out.loss.backward()
    ours = dense.gradients(lm)
    theirs = dense.redi(lm, sequences, alpha=0.3)
    theirs.backward()
    torch.testing.assert_close(out.loss, theirs)
    assert_same_gradients(ours, dense.gradients(lm))


def test_generation_and_logits_are_the_models_own(batch):
    lm, ids = tiny.make_lm(), batch["input_ids"]
    logits, text = lm(ids).logits, lm.generate(ids, max_new_tokens=5, do_sample=False)
    patch(lm)
    assert torch.equal(lm(ids).logits, logits)
    assert torch.equal(lm.generate(ids, max_new_tokens=5, do_sample=False), text)


def test_what_the_models_forward_returns_beside_its_loss(batch):
    """Whatever transformers calls the cache in this version."""
    lm = tiny.make_lm()
    own = lm(**batch, use_cache=True, output_hidden_states=True)
    got = patch(lm)(**batch, use_cache=True, output_hidden_states=True)
    assert set(got) == set(own) - {"logits"}
    for ours, theirs in zip(got.hidden_states, own.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_patch_twice_copy_and_unpatch(batch):
    lm = tiny.make_lm()
    assert patch(patch(lm)) is lm
    clone = copy.deepcopy(lm)
    with torch.no_grad():
        clone.lm_head.weight.zero_()
    assert lm(**batch).loss != clone(**batch).loss  # the copy uses its own weights
    assert unpatch(unpatch(lm)) is lm
    assert not {"forward", "_own_forward"} & set(vars(lm))
    assert lm(**batch).logits is not None
    clone.forward = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match="wrapped again"):
        unpatch(clone)


def test_a_family_with_logits_of_its_own_making_is_refused():
    class Doubled(Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    lm = Doubled(tiny.make_lm().config).train()
    with torch.no_grad():
        lm.lm_head.weight.mul_(20)
    lm.model.layers[0].eval()
    with pytest.raises(ValueError, match="Doubled makes its logits"):
        patch(lm)
    assert lm.training and not lm.model.layers[0].training
    assert "forward" not in vars(lm)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bart", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}, "own loss is"),
        ("recurrent_gemma", {"logits_soft_cap": 30.0}, None),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}, None),
        ("mixtral", {"num_local_experts": 2, "output_router_logits": True}, "balancing loss"),
    ],
)
def test_families_are_judged_by_their_own_loss(family, changes, message, batch):
    """As transformers makes them, with small weights: nothing has to stand out."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**tiny.BASE, "pad_token_id": 0, **changes})
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if message is not None:
        with pytest.raises(ValueError, match=message):
            patch(lm)
        return
    own = lm(**batch, use_cache=False).loss
    torch.testing.assert_close(patch(lm)(**batch).loss, own)


def test_a_masked_model_is_refused():
    """EuroBERT's `*ForMaskedLM` has `.model` and `.lm_head` too."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    lm = EuroBertForMaskedLM(EuroBertConfig(**{**tiny.BASE, "pad_token_id": 0}))
    with pytest.raises(ValueError, match="own loss is"):
        patch(lm)


def test_a_cap_that_the_config_calls_otherwise_is_found():
    class Capped(Qwen2ForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 30 * torch.tanh(out.logits / 30)
            if labels is not None:
                out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
            return out

    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="log-probs are off"):
            patch(Capped(tiny.make_lm(scale=1.0).config).to(dtype))


@pytest.mark.parametrize("family", ["qwen2", *SHAPED])
def test_right_families_are_accepted_in_bfloat16(family):
    patch((tiny.make_lm(family) if family == "qwen2" else make_shaped(family)).bfloat16())


def test_router_losses_of_a_nested_config_are_refused(batch):
    lm = patch(tiny.make_lm("mixtral", num_local_experts=2, pad_token_id=0))
    lm(**batch)
    lm.config.text_config = AutoConfig.for_model("mixtral", output_router_logits=True)
    with pytest.raises(ValueError, match="balancing loss"):
        lm(**batch)
    with pytest.raises(ValueError, match="balancing loss"):
        patch(unpatch(lm))


@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_a_hook_on_the_head_is_found(batch, kind):
    """It would change the logits, which the loss never makes, or their gradient."""
    lm = patch(tiny.make_lm())
    hook = getattr(lm.lm_head, f"register_{kind}")(lambda *_: None)
    with pytest.raises(TypeError, match="lm_head has a hook"):
        lm(**batch)
    hook.remove()
    lm(**batch)


def test_a_head_whose_forward_was_replaced_is_found(batch):
    """As tools do that cast or scale what a module returns."""
    lm = patch(tiny.make_lm())
    own = lm.lm_head.forward
    lm.lm_head.forward = lambda x: own(x) * 2
    with pytest.raises(TypeError, match="lm_head has a hook"):
        lm(**batch)


def test_packs_are_refused_where_they_mix_traces(batch):
    lm = patch(tiny.make_lm("minimax", pad_token_id=0))
    lm(**batch)  # one sequence a row is right
    ids = batch["input_ids"][:1]
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None]
    with pytest.raises(ValueError, match="traces end to end in one row change each other"):
        lm(input_ids=ids, labels=ids, position_ids=positions)
    right = patch(tiny.make_lm())
    right(input_ids=ids, labels=ids, position_ids=positions)


def test_what_cannot_be_right_is_refused(batch):
    with pytest.raises(TypeError, match="a base model and a head"):
        patch(torch.nn.Linear(2, 2))
    lm = tiny.make_lm()
    lm.lm_head = torch.nn.Sequential(lm.lm_head)
    with pytest.raises(TypeError, match="merge_and_unload"):
        patch(lm)
    with pytest.raises(ValueError, match="balancing loss"):
        patch(tiny.make_lm())(**batch, output_router_logits=True)


def test_under_ddp_and_fsdp(batch, tmp_path):
    """One process: enough to see that the loss runs inside the hooks and gets whole weights."""
    plain = tiny.make_lm()
    theirs = dense.cross_entropy(plain, **batch)
    theirs.backward()
    expected = dense.gradients(plain)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(patch(tiny.make_lm()))
        ddp(**batch).loss.backward()
        assert_same_gradients(dense.gradients(ddp.module), expected)
        lm = patch(tiny.make_lm())
        for layer in lm.model.layers:
            fully_shard(layer)
        fully_shard(lm)
        loss = lm(**batch).loss
        loss.backward()
        torch.testing.assert_close(loss, theirs)
        ours = {name: grad.full_tensor() for name, grad in dense.gradients(lm).items()}
        assert_same_gradients(ours, expected)
    finally:
        dist.destroy_process_group()
