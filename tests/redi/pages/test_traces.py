"""The trace page: its log-probs are a textbook's, its colours those of their change."""

import math
import re

import dense
import numpy as np
import pytest
import tiny
from chat_formats import byte_tokenizer
from html_page import HOSTILE, Page

from redi.data.read import read_examples
from redi.data.tokenize import tokenize_examples
from redi.errors import RediError
from redi.pages import traces as trace_page
from redi.pages.html import visible
from redi.pages.token_scores import ScoredExample, ScoredTrace, kind_of, score
from redi.pages.traces import LIMITS, colour, short_names, write_trace_page


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one tokenizer, and pairs; the second rejected trace is missing."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("before", "after")):
        tiny.make_lm(seed=seed).save_pretrained(folder / name)
        tiny.save_tokenizer(folder / name)
    rows = tiny.pair_rows(6)
    del rows[1]["rejected"]
    tiny.write_jsonl(folder / "pairs.jsonl", rows)
    return folder


def page_of(models, **options):
    file = models / "page.html"
    names = (str(models / "before"), str(models / "after"))
    return Page(write_trace_page(*names, str(models / "pairs.jsonl"), file, **options))


def textbook(models):
    """(id, is_chosen, ids of the trained tokens, log-probs before, after) from whole logits."""
    tokenizer = tiny.make_tokenizer()
    examples = read_examples(models / "pairs.jsonl")
    lms = [tiny.make_lm(seed=seed) for seed in (0, 1)]
    for both in tokenize_examples(examples, tokenizer, max_length=None).traces:
        for trace in both:
            ids, start = trace.input_ids.tolist(), trace.num_prompt_tokens
            logps = [dense.logps(lm, ids, start).detach().numpy() for lm in lms]
            yield examples[trace.example].id, trace.is_chosen, ids[start:], *logps


def test_scores_are_a_textbooks(models):
    examples = read_examples(models / "pairs.jsonl")
    folders = [str(models / name) for name in ("before", "after")]
    scored, dropped = score(*folders, examples, max_tokens_per_batch=70)
    assert dropped == 0
    expected = list(textbook(models))
    found = [(e.id, t) for e in scored for t in e.traces]
    assert [(id, t.is_chosen) for id, t in found] == [(id, side) for id, side, *_ in expected]
    for (_, trace), (_, _, ids, before_T, after_T) in zip(found, expected, strict=True):
        assert len(trace.texts) == len(trace.kinds) == len(ids)
        np.testing.assert_allclose(trace.before_T, before_T, atol=2e-4)
        np.testing.assert_allclose(trace.after_T, after_T, atol=2e-4)
        assert trace.kinds[-1] == "special" and "special" not in trace.kinds[:-1]
    sides = [["chosen" if t.is_chosen else "rejected" for t in e.traces] for e in scored]
    assert sides[1] == ["chosen"] and sides[0] == ["chosen", "rejected"]
    # both say "1+0=1"; then the one ends and the other says "1" + ... : where they part
    first = scored[0].traces
    assert "".join(first[0].texts[: first[0].parting]) == "1+0="
    assert scored[1].traces[0].parting == len(scored[1].traces[0].texts)


def test_tokens_on_the_page_have_their_colours_and_figures(models):
    page = page_of(models, sort="id")
    shown = [token for token in page.tokens if token[0] != "part"]
    expected = [
        z for *_, before_T, after_T in textbook(models) for z in zip(before_T, after_T, strict=True)
    ]
    assert len(shown) == len(expected)
    assert {kind[0] for kind, _, _ in shown} == {"n", "u", "d"}
    for (kind, _, title), (before, after) in zip(shown, expected, strict=True):
        figures = [float(x) for x in title.split(" → ")]
        np.testing.assert_allclose(figures, [before, after], atol=0.006)
        change = after - before
        if min(abs(abs(change) - limit) for limit in LIMITS) > 1e-3:  # else rounding decides
            assert kind == colour(change)
    text = "".join(text for _, text, _ in shown)
    assert "1+0=1<e>" in text


def test_summary_is_the_mean_over_tokens(models):
    page = page_of(models)
    for row in page.table("traces", "change"):
        traces = [t for t in textbook(models) if t[1] == (row["traces"] == "chosen")]
        before, after = (np.concatenate([t[i] for t in traces]) for i in (3, 4))
        assert row["number"] == str(len(traces)) and row["tokens"] == str(len(before))
        assert row["before"] == f"{before.mean():.3f}" and row["after"] == f"{after.mean():.3f}"
        assert row["change"] == f"{(after - before).mean():+.3f}"
        stops = np.mean([t[4][-1] - t[3][-1] for t in traces])
        assert row["stop token"] == f"{stops:+.3f}"


def test_what_moved_most_comes_first_unless_ids_are_asked_for(models):
    sizes = {}
    for id, _, _, before_T, after_T in textbook(models):
        sizes[id] = max(sizes.get(id, 0), abs((after_T - before_T).mean()))
    ids = lambda page: re.findall(r"<h3>(sum-\d)</h3>", page.source)
    assert ids(page_of(models)) == sorted(sizes, key=lambda id: -sizes[id])
    assert ids(page_of(models, sort="id", num_problems=4)) == [f"sum-{i}" for i in range(4)]


def test_models_that_do_not_compare(models, tmp_path):
    byte_tokenizer(None, eos_token="</s>").save_pretrained(tmp_path)
    tiny.make_lm().save_pretrained(tmp_path)
    with pytest.raises(RediError, match="tokenizers differ"):
        score(str(models / "before"), str(tmp_path), read_examples(models / "pairs.jsonl"))


def test_colours_at_their_limits():
    assert [colour(x) for x in (0.0, 0.099, -0.1, 0.5, -1.0, 3.5, -10.0)] == [
        *("n", "n", "d1", "u2", "d3", "u4", "d5")
    ]


def test_kinds():
    texts = ["12", " 3.5", "+", " \n", "so", " x2", "中", ""]
    kinds = ["numbers", "numbers", "symbols", "white space", "words", "words", "words", "words"]
    assert [kind_of(text) for text in texts] == kinds


def test_names_that_tell_paths_apart():
    assert short_names("runs/a/sft", "runs/a/redi") == ("sft", "redi")
    assert short_names("runs/a/sft/", "runs/b/sft") == ("a/sft", "b/sft")
    assert short_names("same", "same") == ("same", "same")


def made_up(texts, change=-1.0, is_chosen=True):
    size = len(texts)
    before_T = np.full(size, -0.5, np.float32)
    kinds = tuple(map(kind_of, texts))
    return ScoredTrace(is_chosen, texts[0], tuple(texts), kinds, before_T, before_T + change, 1)


def write_made_up(monkeypatch, folder, examples):
    monkeypatch.setattr(trace_page, "score", lambda *_: (examples, 2))
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    data = tiny.write_jsonl(folder / "pairs.jsonl", rows)
    return Page(write_trace_page("a", "b", str(data), folder / "page.html"))


def test_hostile_tokens_and_ids(tmp_path, monkeypatch):
    traces = [made_up(list(HOSTILE)), made_up(list(HOSTILE), is_chosen=False)]
    page = write_made_up(monkeypatch, tmp_path, [ScoredExample(HOSTILE[0], traces)])
    shown = [text for kind, text, _ in page.tokens if kind != "part"]
    assert shown == [visible(text) for text in HOSTILE] * 2
    assert "2 more rows" in page.text


def test_long_traces_stay_a_small_page_that_says_what_it_lacks(tmp_path, monkeypatch):
    long = [made_up(["<b>"] * 20_000, -3.2), made_up(["&"] * 20_000, 0.0, is_chosen=False)]
    examples = [ScoredExample(f"e{i}", long) for i in range(9)]
    page = write_made_up(monkeypatch, tmp_path, examples)
    assert "14,000 tokens left out, mean change -3.200" in page.text
    shown = page.source.count("<article>")
    assert 1 <= shown < 9 and f"{9 - shown} of 9 problems are counted above" in page.text
    assert page.table("traces", "tokens")[0]["tokens"] == f"{9 * 20_000:,}"  # all of them counted


def test_change_along_the_trace(tmp_path, monkeypatch):
    """The first half moves down, the second up."""
    change = np.where(np.arange(40) < 20, -2.0, 1.0)
    page = write_made_up(monkeypatch, tmp_path, [ScoredExample("e", [made_up(["a"] * 40, change)])])
    ((_, path),) = page.paths
    heights = [float(p.split(" ")[1]) for p in path.replace("M", "L").split("L")[1:]]
    assert len(heights) == trace_page.PARTS
    assert len(set(heights[:10])) == len(set(heights[10:])) == 1 and heights[0] > heights[-1]
    assert math.isclose(change.mean(), -0.5) and page.table("traces")[0]["change"] == "-0.500"
