import gzip
import json
import lzma
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redi.data import files
from redi.data.files import Unreadable, blocks, find_files, read_block, read_rows, unread
from redi.data.read import read_examples
from redi.errors import RediError


def write(file, rows):
    """In the format of the name; "file.arrow" is an Arrow file, other .arrow names are streams."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=250)
    elif file.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_file if file.name == "file.arrow" else pa.ipc.new_stream
        with new(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=200)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    elif file.suffix == ".zst":  # two frames, as `cat a.zst b.zst` makes them
        half = len(text) // 2
        with pa.output_stream(str(file), compression="zstd") as out:
            out.write(text[:half].encode())
        second = file.with_name("second.zst")
        with pa.output_stream(str(second), compression="zstd") as out:
            out.write(text[half:].encode())
        file.write_bytes(file.read_bytes() + second.read_bytes())
        second.unlink()
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text(text)
    return file


FORMATS = {
    "a.jsonl": "line",
    "a.jsonl.gz": "line",
    "a.jsonl.zst": "line",
    "a.parquet": "row",
    "stream.arrow": "row",
    "file.arrow": "row",
    "a.json": "row",
}


@pytest.mark.parametrize("block_bytes", [files.BLOCK_BYTES, 1000])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_in_blocks_of_any_size(
    tmp_path, monkeypatch, name, block_bytes
):
    monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
    rows = [{"prompt": f"é {i}", "n": i, "list": ["x", None]} for i in range(600)]
    file = write(tmp_path / name, rows)
    read = list(read_rows(file))
    assert [row for _, row in read] == rows
    assert [where for where, _ in read] == [f"{name} {FORMATS[name]} {i}" for i in range(1, 601)]
    cut = list(blocks(file, name))
    assert 0.9 * file.stat().st_size <= sum(b.bytes for b in cut) <= file.stat().st_size
    expected = {"a.parquet": 3, "a.json": 1}.get(name, 10)
    assert len(cut) >= (expected if block_bytes == 1000 else 1)
    again = [row for block in reversed(cut) for row in read_block(block)]  # each for itself
    assert sorted(again, key=lambda pair: pair[1]["n"]) == read


def test_a_row_that_is_no_text_spoils_only_itself(tmp_path):
    lines = [b'{"n": 1}', b'{"n": "\xff"}', b"{", b'["\\ud83d"]', rb'{"n": "\ud83d"}', b"[2]"]
    lines += [
        rb'{"n": "\ud83d\ude00"}',
        b"[" * 100_000,
        b'{"n": 2}',
        b'{"n": ' + b"1" * 5000 + b"}",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    [block] = blocks(tmp_path / "a.jsonl", "a.jsonl")
    rows = [row for _, row in read_block(block)]
    reasons = [row.reason if isinstance(row, Unreadable) else row["n"] for row in rows]
    text, kind = "not UTF-8 text", "not an object with named columns"
    assert reasons == [
        1,
        text,
        "not JSON",
        text,
        text,
        kind,
        "\U0001f600",
        "not JSON",
        2,
        "not JSON",
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_bytes_that_are_no_text_in_a_text_column(tmp_path, name):
    bad = pa.array([b"a", b"\xff", b"b"], pa.binary()).view(pa.string())
    table = pa.table({"n": bad})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    [block] = blocks(tmp_path / name, name)
    assert [row for _, row in read_block(block)] == [
        {"n": "a"},
        Unreadable("not UTF-8 text", "invalid start byte at byte 0"),
        {"n": "b"},
    ]
    with pytest.raises(RediError, match=f"{name} row 2: not UTF-8 text: invalid start byte"):
        list(read_rows(tmp_path / name))


def test_a_line_too_long_for_memory_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAX_LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n' + json.dumps({"n": "x" * 100}))
    with pytest.raises(RediError, match="after line 1: cannot be read: a line of more than"):
        list(read_rows(tmp_path / "a.jsonl"))


def test_folders_of_datasets(tmp_path):
    """What save_to_disk leaves, a folder of `map`'s caches in it; and one with several splits."""
    import datasets

    rows = [{"n": i} for i in range(10)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    write(tmp_path / "one" / "cache-1234.arrow", [{"n": 99}])
    assert [row for _, row in read_rows(tmp_path / "one")] == rows
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    with pytest.raises(RediError, match="holds the splits train, test; name the one"):
        find_files(tmp_path / "two")
    assert [row for _, row in read_rows(tmp_path / "two" / "test")] == rows


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("open-r1/Raw", ("open-r1/Raw", None, "train")),
        ("open-r1/Raw:default", ("open-r1/Raw", "default", "train")),
        ("open-r1/Raw@test", ("open-r1/Raw", None, "test")),
        ("open-r1/Raw:extended@train", ("open-r1/Raw", "extended", "train")),
    ],
)
def test_hub_names_go_to_datasets(tmp_path, monkeypatch, path, asked):
    file, calls = write(tmp_path / "cached.arrow", [{"n": 1}]), []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return types.SimpleNamespace(cache_files=[{"filename": str(file)}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_rows(path)) == [("cached.arrow row 1", {"n": 1})]
    assert calls == [asked]


def test_a_slice_of_a_split_is_read_alone(tmp_path, monkeypatch):
    """`datasets` gives the whole split's cache file for it: held-out rows would hold all others."""
    whole = [{"n": n} for n in range(10)]
    file, written = write(tmp_path / "cached.arrow", whole), []

    def load_dataset(name, config, split):
        start = 2 if split == "train[2:]" else 9

        def to_parquet(path):
            written.append(split)
            pq.write_table(pa.Table.from_pylist(whole[start:]), path)

        return types.SimpleNamespace(cache_files=[{"filename": str(file)}], to_parquet=to_parquet)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for _ in range(2):  # written once
        assert [row for _, row in read_rows("open-r1/Raw@train[2:]")] == whole[2:]
        expected = [("train[90%:].parquet row 1", whole[9])]
        assert list(read_rows("open-r1/Raw@train[90%:]")) == expected
    assert written == ["train[2:]", "train[90%:]"]
    assert len(list(tmp_path.iterdir())) == 3


def test_hub_names_without_datasets_or_network(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(RediError, match=r"open-r1/Raw: no such file .* not to be had .*no network"):
        find_files("open-r1/Raw")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RediError, match=r"open-r1/Raw: no such file .*pip install datasets"):
        find_files("open-r1/Raw")
    with pytest.raises(RediError, match=r"absent/raw.jsonl: no such file"):
        find_files("absent/raw.jsonl")


def test_folders_and_globs_are_read_in_order_and_say_where(tmp_path):
    write(tmp_path / "b.jsonl", [{"n": 2}])
    write(tmp_path / "a.parquet", [{"n": 1}])
    write(tmp_path / "deep" / "b.jsonl", [{"n": 3}])
    (tmp_path / "notes.txt").write_text("no data")
    read = list(read_rows(tmp_path))
    assert [(where, row["n"]) for where, row in read] == [
        ("a.parquet row 1", 1),
        ("b.jsonl line 1", 2),
        ("deep/b.jsonl line 1", 3),
    ]
    assert [row["n"] for _, row in read_rows(f"{tmp_path}/**/b.*")] == [2, 3]


def test_blank_lines_count_as_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"n": 1}\n   \n{"n": 2}')
    assert list(read_rows(file)) == [("a.jsonl line 2", {"n": 1}), ("a.jsonl line 4", {"n": 2})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"n": 1}\n{"n": 2}\n{"n": 3\n', "a.jsonl line 3: not JSON: .* column 8"),
        ("a.jsonl", b'{"n": 1}\n[1]\n', "a.jsonl line 2: not an object .*: a list"),
        ("a.jsonl", b'{"n": 1}\n{"n": "\xff\xfe"}\n', "a.jsonl line 2: not UTF-8 text"),
        ("a.jsonl.gz", b"no archive", "a.jsonl.gz after line 0: cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"n": 1}\n', mtime=0)[:-6],
            "a.jsonl.gz after line 1: cannot be read",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"n": 1}\n', mtime=0)[:10] + b"\xff" * 20,
            "a.jsonl.gz after line 0: cannot be read: .*invalid block type",
        ),
        (
            "a.jsonl.zst",
            pa.Codec("zstd").compress(b'{"n": 1}\n' * 9, asbytes=True)[:-6],
            "a.jsonl.zst after line .: cannot be read",
        ),
        ("a.arrow", b"no arrow", "a.arrow after row 0: cannot be read"),
        ("a.json", b'{"n": 1}', "a.json row 1: not a list of objects"),
        ("a.parquet", b"no parquet", "a.parquet after row 0: cannot be read"),
        ("a.csv", b"n\n1\n", "a.csv: not a data file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RediError, match=message):
        list(read_rows(tmp_path / name))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(RediError, match=r"absent.jsonl: no such file"):
        find_files(tmp_path / "absent.jsonl")
    with pytest.raises(RediError, match=r"holds no .jsonl"):
        find_files(tmp_path)
    with pytest.raises(RediError, match=r"\*.parquet: no such file"):
        find_files(tmp_path / "*.parquet")
    write(tmp_path / "empty.jsonl", [])
    with pytest.raises(RediError, match=r"empty.jsonl: no rows"):
        read_examples(tmp_path / "empty.jsonl")


def test_a_built_folder_is_not_read_twice(tmp_path):
    for name in ("positives", "pairs"):
        write(tmp_path / f"{name}.parquet", [{"prompt": "p", "chosen": "2", "rejected": "3"}])
    with pytest.raises(RediError, match="name one of them"):
        read_examples(tmp_path)


def test_hidden_files_are_not_read_and_others_are_named(tmp_path):
    write(tmp_path / "b.jsonl", [{"n": 1}])
    write(tmp_path / ".ipynb_checkpoints" / "a.jsonl", [{"n": 99}])
    write(tmp_path / "._b.jsonl", [{"n": 99}])
    for name in ("c.csv", "d.json", "deep/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert unread(tmp_path) == ["c.csv", "d.json", "deep/e.txt"]
    with pytest.warns(UserWarning, match=r"not read: c.csv, d.json, deep/e.txt$"):
        assert [row for _, row in read_rows(tmp_path)] == [{"n": 1}]
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(RediError, match=r"holds no .jsonl .*; it holds c.csv, d.json, deep/e.txt"):
        find_files(tmp_path)


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.jsonl.xz", "a.NDJSON.GZ", "a.json"])
def test_json_lines_by_other_names(tmp_path, name):
    text = b'{"n": 1}\n{"n": 2}\n'
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get((tmp_path / name).suffix.lower())
    (tmp_path / name).write_bytes(pack(text) if pack else text)
    assert [row["n"] for _, row in read_rows(tmp_path / name)] == [1, 2]
    assert name.endswith(".json") or find_files(tmp_path) == [tmp_path / name]


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train.jsonl", "validation.jsonl"),
        ("train/a.jsonl", "dev/a.jsonl"),
        ("math_train.jsonl", "math_test.jsonl"),
    ],
)
def test_splits_are_not_mixed(tmp_path, names):
    for name in names:
        write(tmp_path / name, [{"n": 1}])
    for path in (tmp_path, f"{tmp_path}/**"):
        with pytest.raises(RediError, match=r"holds files of the splits .*train \(.*name one file"):
            find_files(path)
        assert len(find_files(path, mix_splits=True)) == len(names)
    assert len(find_files(f"{tmp_path}/{names[0].replace('train', 't*n')}")) == 1


def test_utf_16_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"n": 1}\n'.encode("utf-16"))
    with pytest.raises(RediError, match=r"a.jsonl after line 0: .* UTF-16 text; save it as UTF-8"):
        list(read_rows(tmp_path / "a.jsonl"))
