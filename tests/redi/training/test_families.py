"""Single families through the checks of `make families`, which tries them all."""

from pathlib import Path

import pytest
import torch
from redi_kernels import anatomy
from tiny import architecture, make_lm, train_settings

from redi.config import TrainConfig
from redi.training.plan import Planner

BENCH = Path(__file__).resolve().parents[3] / "bench"


@pytest.fixture(autouse=True)
def bench_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


# A body of another name, a head too; a decoder inside the body; blocks that drop attention's
# keywords; a language model inside a multimodal one; a config that does not read the old names of
# its rope.
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "nemotron", "gemma3", "gemma4_text"])
def test_parts_are_found_by_structure(family):
    from family_checks import check_family

    row = check_family(family, quick=True)
    assert (row["packed"], row["patch"]) == ("right", "right"), row


def test_what_drops_the_boundaries_trains_one_trace_at_a_time():
    from family_checks import check_family

    assert check_family("nemotron", quick=True)["alone"]


def test_a_bidirectional_family_is_refused_in_one_sentence():
    from family_checks import check_family

    row = check_family("bert", quick=True)
    assert row["packed"] == row["patch"] == "refused", row


def test_a_wrong_model_is_found(monkeypatch):
    """The check itself: a window that is forgotten, a bias that is not exported."""
    import family_checks
    from family_checks import check_family

    from redi.training import attention

    own = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *a, **k: own(*a, **{**k, "window": None}))
    monkeypatch.setattr(family_checks, "load_model", None)  # not needed in the quick form
    row = check_family("mistral", quick=True)
    assert row["outcome"] in ("wrong", "refused"), row
    assert row["packed_why"]


def test_windows_experts_and_kinds_of_layers_are_in_use():
    from tiny_families import tiny_config

    assert tiny_config("mistral").sliding_window < 20
    assert tiny_config("mixtral").num_local_experts == 4
    assert len(set(tiny_config("gemma3_text").layer_types)) == 2
    assert tiny_config("gemma3").text_config.hidden_size == 32


def test_blocks_are_the_language_models():
    lm = make_lm("llama")
    assert anatomy.blocks_of(lm) is lm.model.layers
    assert anatomy.output_layer(lm) is lm.lm_head
    with pytest.raises(TypeError, match="no causal LM"):
        anatomy.body_of(torch.nn.Linear(2, 2))


class Stub(torch.nn.Module):
    """A head of another name, and an encoder beside the decoder that is larger than it."""

    def __init__(self):
        super().__init__()
        linear, several = torch.nn.Linear, torch.nn.ModuleList
        self.model = torch.nn.ModuleDict({"vision": several([linear(9, 9)]), "text": linear(2, 2)})
        self.model["text"].layers = several([linear(2, 2)])
        self.embed_out = linear(2, 5)

    def get_decoder(self):
        return self.model["text"]

    def get_output_embeddings(self):
        return self.embed_out


def test_parts_of_any_name():
    lm = Stub()
    assert anatomy.output_layer(lm) is lm.embed_out
    assert anatomy.blocks_of(lm) is lm.model["text"].layers


def test_a_mixture_of_experts_is_planned_in_float32(tmp_path):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    settings = train_settings(tmp_path, architecture=architecture("mixtral", **experts))
    assert Planner(TrainConfig(**settings)).memory(0).activations > 0
