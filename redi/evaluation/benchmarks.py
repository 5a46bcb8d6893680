"""The benchmarks of `redi eval --benchmarks`: where their problems are.

Files may be .json (one array), .jsonl or .parquet, named as here (`files`), as the paper's
evaluation code names them. Without a file, the name on the Hub is used (needs `datasets`).
"""

from dataclasses import dataclass
from pathlib import Path

from redi.errors import RediError

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Benchmark:
    title: str
    files: tuple[str, ...]  # names without suffix
    hub: str
    num_problems: int  # in the paper, or as published


BENCHMARKS = {
    "math500": Benchmark("MATH-500", ("math500", "math"), "HuggingFaceH4/MATH-500@test", 500),
    "aime24": Benchmark("AIME24", ("aime24", "aime"), "HuggingFaceH4/aime_2024@train", 30),
    "aime25": Benchmark("AIME25", ("aime25",), "math-ai/aime25@test", 30),
    # AMC12 of 2022 and 2023; the set of 40 problems that others call AMC23 is another one.
    "amc23": Benchmark("AMC23", ("amc23", "amc"), "AI-MO/aimo-validation-amc@train", 83),
    "minerva": Benchmark("Minerva", ("minerva",), "math-ai/minervamath@test", 272),
    "olympiadbench": Benchmark(
        "OlympiadBench",
        ("olympiadbench", "olympiad_bench"),
        "lkevinzc/math-eval@olympiad_bench",
        675,
    ),
    "gsm8k": Benchmark("GSM8K", ("gsm8k", "gsm8k/test"), "openai/gsm8k:main@test", 1319),
}


def find_benchmark(name: str, data_dir: str | None) -> str:
    """The file of a benchmark in `data_dir`, else its name on the Hub.

    Raises RediError for an unknown name, and for a `data_dir` without the benchmark's file.
    """
    if name not in BENCHMARKS:
        raise RediError(f"benchmarks: {name!r} is none of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    if data_dir is None:
        return benchmark.hub
    for stem in benchmark.files:
        for file in (Path(data_dir) / f"{stem}{suffix}" for suffix in SUFFIXES):
            if file.is_file():
                return str(file)
    expected = " or ".join(f"{stem}.json" for stem in benchmark.files)
    raise RediError(f"{data_dir}: no {expected} (or .jsonl, .parquet) for the benchmark {name}")
