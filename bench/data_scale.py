"""`redi data build` at scale: rows/s, peak memory of all processes, and kills that change no byte.

    python bench/data_scale.py                        516,000 + 20,000 rows, an hour on 2 cores
    python bench/data_scale.py --rows 5000 --full-rows 200

What it builds is made here, in a minute or two, from a fixed seed: rows in the schema of
OpenR1-Math-Raw, in parquet files of 1,000-row groups, at a tenth of real length (traces of 500
tokens in the median, log-normal), and rows at full length (5,000) as JSON lines, half of them .zst.
Traces are pieces of one text of made-up words and LaTeX, with <think>, </think> and a boxed answer,
so that lengths, characters and answers are as real ones and the words are not. The dirt: nulls,
empty generations, verdict lists of the wrong length, judges that said nothing, duplicate problems,
traces of 60,000 tokens, lines that are not UTF-8, missing </think>, answers that hang a parser.

The build runs in a process of its own, with a tokenizer (8,000 byte-level BPE tokens, ChatML),
max_length 32768 and the first 500 problems as an evaluation set. It is run once in peace, then
again into another folder and killed with SIGKILL four times; the files of both must be the same.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SOURCES = ["olympiads", "cn_contest", "aops_forum", "amc_aime", "cn_k12", "number_theory"]
CHARS_PER_TOKEN = 3.0  # of the text below with the tokenizer below; printed as measured
OUTPUTS = ("positives.parquet", "pairs.parquet", "report.txt", "report.json")
VERDICTS = pa.list_(pa.bool_())
SCHEMA = pa.schema(
    [
        ("problem", pa.string()),
        ("solution", pa.string()),
        ("answer", pa.string()),
        ("problem_type", pa.string()),
        ("question_type", pa.string()),
        ("problem_is_valid", pa.string()),
        ("source", pa.string()),
        ("uuid", pa.string()),
        ("generations", pa.list_(pa.string())),
        (
            "correctness",
            pa.struct(
                [
                    ("llama_verification", VERDICTS),
                    ("math_verify", VERDICTS),
                    ("math_verify_reparsed_answer", VERDICTS),
                ]
            ),
        ),
    ]
)


class Maker:
    """Rows from a fixed pool of text."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        syllables = (
            "ba",
            "de",
            "ki",
            "lo",
            "mu",
            "na",
            "po",
            "ra",
            "se",
            "ti",
            "vo",
            "xu",
            "qua",
            "the",
            "ing",
            "and",
            "so",
            "then",
            "wait",
            "let",
            "we",
            "is",
        )
        words = [
            "".join(self.random.choices(syllables, k=self.random.randint(1, 4)))
            for _ in range(6000)
        ]
        weights = 1 / np.arange(1, len(words) + 1)
        picks = np.random.default_rng(seed).choice(len(words), 1_200_000, p=weights / weights.sum())
        maths = ("$x^{%d}+%d$", "\\frac{%d}{%d}", "%d = %d", "\n\n%d. \\sqrt{%d}", "(%d, %d)")
        pieces = [
            words[i]
            if n % 7
            else self.random.choice(maths)
            % (self.random.randint(1, 99), self.random.randint(1, 999))
            for n, i in enumerate(picks.tolist())
        ]
        self.pool = " ".join(pieces)
        self.problems: list[str] = []

    def text(self, chars: int) -> str:
        chars = min(chars, len(self.pool) - 1)
        start = self.random.randrange(len(self.pool) - chars)
        return self.pool[start : start + chars]

    def row(self, number: int, median_tokens: int) -> dict:
        rnd = self.random
        value, base = rnd.randint(2, 999), rnd.randint(2, 60)
        answer = rnd.choice(
            [str(value), str(value), f"\\frac{{{value}}}{{{base}}}", f"{value}\\sqrt{{{base}}}"]
        )
        problem = f"Problem {number}: {self.text(rnd.randint(80, 400))}?"
        if self.problems and rnd.random() < 0.01:
            problem = rnd.choice(self.problems)  # a duplicate
        elif len(self.problems) < 5000:
            self.problems.append(problem)
        num = rnd.choices([1, 2, 3, 4, 8], [2, 90, 1, 5, 2])[0]
        generations: list[str | None] = []
        right: list[bool] = []
        for _ in range(num):
            chars = int(CHARS_PER_TOKEN * median_tokens * rnd.lognormvariate(0, 0.8))
            if rnd.random() < 2e-4:
                chars = int(CHARS_PER_TOKEN * 60_000)
            is_right = rnd.random() < 0.63
            given = answer if is_right else str(value + rnd.randint(1, 9))
            close = "" if rnd.random() < 0.01 else "\n</think>\n\n"
            text: str | None = (
                f"<think>\n{self.text(chars)}{close}The answer is \\boxed{{{given}}}."
            )
            dirt = rnd.random()
            if dirt < 0.004:
                text = rnd.choice(["", None, " \n"])
            elif dirt < 0.008:
                text = f"<think>\n{self.text(chars)}\n</think>\n\nI do not know."
            generations.append(text)
            right.append(is_right)
        judges = [[vote if rnd.random() < 0.97 else not vote for vote in right] for _ in range(3)]
        for verdicts in judges:
            if rnd.random() < 0.1:
                verdicts[rnd.randrange(num)] = None  # type: ignore[call-overload]
        if rnd.random() < 0.01:
            rnd.choice(judges).append(True)
        llama = None if rnd.random() < 0.2 else judges[0]
        correctness = {
            "llama_verification": llama,
            "math_verify": judges[1],
            "math_verify_reparsed_answer": judges[2],
        }
        if rnd.random() < 1e-5:  # hangs sympy, and nobody has judged it
            generations[0] = "<think>\n</think> \\boxed{9^{9^{9^9}}}"
            correctness = dict.fromkeys(correctness)
        return {
            "problem": None if rnd.random() < 0.001 else problem,
            "solution": self.text(200),
            "answer": None if rnd.random() < 0.005 else answer,
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "problem_is_valid": rnd.choices(["Yes", "Incomplete", None], [95, 4, 1])[0],
            "source": rnd.choice(SOURCES),
            "uuid": f"row-{number}",
            "generations": None if rnd.random() < 0.001 else generations,
            "correctness": None if rnd.random() < 0.002 else correctness,
        }


def generate(folder: Path, rows: int, full_rows: int) -> None:
    folder.mkdir(parents=True)
    maker = Maker(0)
    per_file = 26_000
    for start in range(0, rows, per_file):
        with pq.ParquetWriter(folder / f"train-{start // per_file:05d}.parquet", SCHEMA) as writer:
            for first in range(start, min(start + per_file, rows), 1000):
                numbers = range(first, min(first + 1000, start + per_file, rows))
                made = [maker.row(number, 500) for number in numbers]
                writer.write_table(pa.Table.from_pylist(made, SCHEMA), row_group_size=1000)
    for half in range(2):
        lines = folder / f"long-{half}.jsonl"
        with lines.open("wb") as file:
            for number in range(half * full_rows // 2, (half + 1) * full_rows // 2):
                line = json.dumps(maker.row(rows + number, 5000), ensure_ascii=False).encode()
                if maker.random.random() < 0.001:
                    line = line.replace(b"a", b"\xff", 1)
                file.write(line + b"\n")
        if half:
            with (
                lines.open("rb") as plain,
                pa.output_stream(f"{lines}.zst", compression="zstd") as out,
            ):
                while block := plain.read(1 << 22):
                    out.write(block)
            lines.unlink()
    evaluation = folder.parent / "evaluation.jsonl"
    evaluation.write_text("".join(json.dumps({"problem": p}) + "\n" for p in maker.problems[:500]))
    make_tokenizer(maker.pool[:2_000_000]).save_pretrained(folder.parent / "tokenizer")


def make_tokenizer(text: str):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=8000, show_progress=False)
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def command(folder: Path, output: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "redi", "data", "build"),
        *("--path", str(folder / "raw"), "--output_dir", str(output)),
        *("--tokenizer", str(folder / "tokenizer"), "--max_length", "32768"),
        *("--decontaminate", f"[{folder / 'evaluation.jsonl'}]"),
    ]


class Watch(threading.Thread):
    """Memory of a process and all below it, every half second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.most = pid, {"Rss": 0, "Pss": 0}, 0

    def run(self) -> None:
        while Path(f"/proc/{self.pid}").exists():
            pids = descendants(self.pid)
            sums = {"Rss": 0, "Pss": 0}
            for pid in pids:
                try:
                    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                        name = line.split(":")[0]
                        if name in sums:
                            sums[name] += int(line.split()[1]) * 1024
                except (OSError, IndexError):  # it has just ended
                    continue
            self.peak = {name: max(self.peak[name], size) for name, size in sums.items()}
            self.most = max(self.most, len(pids))
            time.sleep(0.5)


def descendants(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(p for child in children for p in descendants(child))]


def build(folder: Path, output: Path, kill_at: float | None = None) -> float | None:
    """Seconds that a build took, or None if it was killed, `kill_at` seconds after its start."""
    start = time.monotonic()
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command(folder, output), stdout=log, stderr=log)
        watch = Watch(process.pid)
        watch.start()
        try:
            status = process.wait(kill_at)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None
    assert status == 0, f"exit status {status}, see {folder / 'log'}"
    build.watch = watch  # type: ignore[attr-defined]
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/data-scale"))
    parser.add_argument("--rows", type=int, default=516_000)
    parser.add_argument("--full-rows", type=int, default=20_000)
    parser.add_argument("--no-kill", action="store_true")
    args = parser.parse_args()
    folder, raw = args.folder, args.folder / "raw"
    if not raw.exists():
        start = time.monotonic()
        generate(raw, args.rows, args.full_rows)
        print(f"generated in {time.monotonic() - start:.0f} s", flush=True)
    size = sum(file.stat().st_size for file in raw.iterdir())
    print(f"input: {args.rows + args.full_rows:,} rows, {size / 2**30:.2f} GiB on disk, "
          f"{os.cpu_count()} cores", flush=True)  # fmt: skip
    seconds = build(folder, folder / "peace")
    watch = build.watch  # type: ignore[attr-defined]
    report = json.loads((folder / "peace" / "report.json").read_text())
    rows = report["counts"]["rows read"]
    print(f"build: {rows:,} rows in {seconds:.0f} s, {rows / seconds:,.0f} rows/s", flush=True)
    print(f"memory, all {watch.most} processes: peak {watch.peak['Pss'] / 2**20:,.0f} MiB (PSS); "
          f"{watch.peak['Rss'] / 2**20:,.0f} MiB as a sum of RSS, shared pages counted in each",
          flush=True)  # fmt: skip
    print((folder / "peace" / "report.txt").read_text(), flush=True)
    if args.no_kill:
        return
    kills = 0
    for share in (0.1, 0.35, 0.3, 0.2):
        kills += build(folder, folder / "killed", kill_at=share * seconds) is None
    rest = build(folder, folder / "killed")
    pairs = [
        ((folder / "peace" / name).read_bytes(), (folder / "killed" / name).read_bytes())
        for name in OUTPUTS
    ]
    same = all(a == b for a, b in pairs)
    print(f"killed {kills} times, the last run took {rest:.0f} s: "
          + ("the same bytes" if same else "OTHER BYTES"))  # fmt: skip
    sys.exit(not same)


if __name__ == "__main__":
    main()
