"""Blocks, workers, kills, and builds that are there already."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from builds import OUTPUTS, outputs, raw, run, texts, write
from chat_formats import chatml, llama3

import redi.grading.verify
from redi.config import DataConfig
from redi.data import files
from redi.data.build import build
from redi.data.choose import Chooser
from redi.errors import RediError, VerifierFailed


def many(num=60, **columns):
    """Rows of different problems, with algebra for the judge's worker, duplicates and dirt."""
    rows = []
    for i in range(num):
        generations = [f"{i} ####{j}" for j in range(i % 4 + 1)] + [r"so \boxed{\frac42}", None]
        rows.append({**raw(generations, id=str(i), source="ab"[i % 2]), **columns})
        rows[-1]["problem"] = f"1+1? ({i // 2 if i % 10 == 1 else i})"
    return rows


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)


@pytest.mark.parametrize("shuffle_seed", [pytest.param(None, marks=pytest.mark.slow), 42])
def test_same_bytes_whatever_the_workers_and_blocks(tmp_path, monkeypatch, shuffle_seed):
    path, built = str(write(tmp_path, many())), {}
    for workers, block_bytes in ((1, 4 << 20), (1, 1000), (3, 1000)):
        monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
        config = DataConfig(path=path, num_workers=workers, shuffle_seed=shuffle_seed)
        out = tmp_path / f"{workers}-{block_bytes}"
        build(config, out, tokenizer=chatml())
        built[out] = outputs(out)
    first, *others = built.values()
    assert list(first) and all(other == first for other in others)


KILLED = """
import os, sys
import redi.grading.verify
from redi.config import DataConfig
from redi.data import build, files
files.BLOCK_BYTES = 1000
path, out, end = sys.argv[1:]
publish, done = build.publish, 0

def publish_and_die(aside, targets):
    global done
    done += 1
    if end == "part" and done == 4:
        os._exit(9)
    publish(aside, targets)
    if end == "after" and done == 4:
        os._exit(9)

def merge_and_die(*args, **kwargs):
    merge(*args, **kwargs)
    os._exit(9)

build.publish = publish_and_die
if end == "merge":
    merge, build.merge = build.merge, merge_and_die
build.build(DataConfig(path=path, num_workers=int(end == "after") + 1), out)
"""


@pytest.mark.parametrize("end", ["part", "merge", pytest.param("after", marks=pytest.mark.slow)])
def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path, small_blocks, end):
    path = str(write(tmp_path, many()))
    build(DataConfig(path=path, num_workers=1), tmp_path / "peace")
    program = [sys.executable, "-c", KILLED, path, str(tmp_path / "killed"), end]
    assert subprocess.run(program).returncode == 9
    found = sorted((tmp_path / "killed" / ".building").glob("*[0-9].json"))
    seen = []
    build(
        DataConfig(path=path, num_workers=1),
        tmp_path / "killed",
        progress=lambda rows, share: seen.append((rows, share)),
    )
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "peace")
    assert len(found) >= 3
    if end == "merge":
        assert seen == []
    else:
        assert seen[-1] == (60, 1.0) and seen[0][0] > 10  # what was found is not news


def test_parts_that_are_done_are_not_done_again(tmp_path, small_blocks, monkeypatch):
    path = str(write(tmp_path, many()))
    run_block, blocks = Chooser.run, []

    def run_until(self, block, verifier):
        blocks.append(block.first)
        if len(blocks) == 4:
            raise KeyboardInterrupt
        return run_block(self, block, verifier)

    monkeypatch.setattr(Chooser, "run", run_until)
    with pytest.raises(KeyboardInterrupt):
        build(DataConfig(path=path, num_workers=1), tmp_path / "out")
    build(DataConfig(path=path, num_workers=1), tmp_path / "out")
    assert len(blocks) > 6 and len(set(blocks)) == len(blocks) - 1 and blocks[3] == blocks[4]
    # Other options: the parts that are there are another build's.
    blocks[:] = [0] * 3
    monkeypatch.setattr(Chooser, "run", run_until)
    with pytest.raises(KeyboardInterrupt):
        build(DataConfig(path=path, num_workers=1), tmp_path / "other")
    blocks[:] = [0] * 4
    build(DataConfig(path=path, num_workers=1, judges="any"), tmp_path / "other")
    build(DataConfig(path=path, num_workers=1, judges="any"), tmp_path / "alone")
    assert outputs(tmp_path / "other") == outputs(tmp_path / "alone")


def test_a_build_that_is_there_is_only_read(tmp_path, monkeypatch):
    rows = [raw(["####2", "####3"])]
    report = run(tmp_path, rows, chatml())
    monkeypatch.setattr(Chooser, "run", None)
    assert run(tmp_path, rows, chatml(), anew=False, num_workers=2) == report


TACIT = "other tokenizer, template, or version of redi or math-verify; choose"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [raw(["####2", "####4"])]}, "other input files; choose"),
        ({"judges": "any"}, "other judges; choose"),
        (
            {"tokenizer": None},
            TACIT,
        ),
        (
            {"tokenizer": llama3()},
            TACIT,
        ),
        (
            {"tokenizer": "template"},
            TACIT,
        ),
        ({"decontaminate": True}, "other decontaminate; choose"),
    ],
)
def test_another_build_is_not_overwritten(tmp_path, change, message):
    """A changed template never meets old tokens."""
    start = {"rows": [raw(["####2", "####3"])], "tokenizer": chatml()}
    run(tmp_path, **start)
    before = outputs(tmp_path / "out")
    if change.get("tokenizer") == "template":
        change = {"tokenizer": chatml()}
        change["tokenizer"].chat_template += " "
    if "decontaminate" in change:
        change = {"decontaminate": [str(write(tmp_path, [{"problem": "x"}], "eval.jsonl"))]}
    with pytest.raises(RediError, match=f"out: holds data built from {message} another output_dir"):
        run(tmp_path, **(start | change), anew=False)
    assert outputs(tmp_path / "out") == before


def test_data_judged_by_other_rules_is_another_build(tmp_path, monkeypatch):
    rows = [raw(["####2", "####3"])]
    run(tmp_path, rows)
    for name, changed in (("RULES", -1), ("metadata", SimpleNamespace(version=lambda name: "0"))):
        with monkeypatch.context() as other:
            other.setattr(redi.grading.verify, name, changed)
            with pytest.raises(RediError, match=TACIT):
                run(tmp_path, rows, anew=False)
    run(tmp_path, rows, anew=False)


def test_a_changed_evaluation_set_is_another_build(tmp_path):
    config = {"decontaminate": [str(write(tmp_path, [{"problem": "x"}], "eval.jsonl"))]}
    rows = [raw(["####2", "####3"])]
    run(tmp_path, rows, **config)
    write(tmp_path, [{"problem": "y"}], "eval.jsonl")
    with pytest.raises(RediError, match="holds data built from other"):
        run(tmp_path, rows, anew=False, **config)


def test_two_builds_cannot_share_a_folder(tmp_path, monkeypatch):
    write(tmp_path, [raw(["####2", "####3"])])
    config = DataConfig(path=str(tmp_path / "raw.jsonl"))

    def meanwhile(rows, share):
        with pytest.raises(RediError, match="another build is at work"):
            build(config, tmp_path / "out")

    build(config, tmp_path / "out", progress=meanwhile)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == OUTPUTS


def test_full_disk_leaves_what_is_done(tmp_path):
    """A process that may write no file beyond 20 KB, as if the disk were full."""
    noise = [f"{hash((i, 'x'))} {hash((i, 'y'))} " * 40 for i in range(100)]
    write(tmp_path, [raw([text + "####2", text + "####3"]) for text in noise], "big.jsonl")
    program = (
        "import resource, sys\n"
        "from redi.config import DataConfig\n"
        "from redi.data.build import build\n"
        "from redi.errors import RediError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    build(DataConfig(path=sys.argv[1], duplicates='keep'), sys.argv[2])\n"
        "except RediError as error:\n"
        "    sys.exit(f'user error: {error}')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "big.jsonl"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert result.stderr.startswith(f"user error: {tmp_path / 'out'}: cannot be written")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".building"]
    config = DataConfig(path=str(tmp_path / "big.jsonl"), duplicates="keep")
    assert build(config, tmp_path / "out").counts["pairs"] == 100


def test_files_of_two_builds_are_never_taken_for_one(tmp_path, monkeypatch):
    """Interrupted between two renames, the folder has no report.json."""
    replace = os.replace

    def replace_once(source, target):
        if target.name == "pairs.parquet":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(RediError, match="No space left on device"):
        run(tmp_path, [raw(["####2", "####3"])])
    assert (tmp_path / "out" / "positives.parquet").exists()
    assert not (tmp_path / "out" / "report.json").exists()
    monkeypatch.undo()
    (tmp_path / "out" / ".building" / "pairs.parquet").write_text("half")
    run(tmp_path, [raw(["####2", "####3"])] * 2, anew=False)
    assert len(texts(tmp_path, "pairs")) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == OUTPUTS


def test_a_verifier_that_does_not_start_costs_no_part(tmp_path, small_blocks, monkeypatch):
    path, run_block, blocks = str(write(tmp_path, many())), Chooser.run, []

    def run_until(self, block, verifier):
        blocks.append(block.first)
        if len(blocks) == 4:
            raise VerifierFailed("a verifier process did not start: no memory")
        return run_block(self, block, verifier)

    monkeypatch.setattr(Chooser, "run", run_until)
    with pytest.raises(RediError, match="did not start"):
        build(DataConfig(path=path, num_workers=1), tmp_path / "out")
    build(DataConfig(path=path, num_workers=1), tmp_path / "out")
    assert len(blocks) > 6 and len(set(blocks)) == len(blocks) - 1 and blocks[3] == blocks[4]
