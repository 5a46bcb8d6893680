"""What evaluations measured and how sure it is: pass@1, pass@k, majority@k, errors, differences."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb, sqrt
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import numpy as np

from redi.errors import RediError
from redi.files import read_json

# Student's t, 97.5% quantile, of 1, 2, ... degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
VERDICTS = ("correct", "wrong", "unparsable", "timeout", "refused")  # the last: by the server
Metric = Literal["pass@1", "gap"]
# What moves a score besides the model: of evaluation.json, its recipe included.
SETTINGS = (
    *("rules", "grader", "temperature", "top_p", "max_new_tokens"),
    *("system_prompt", "prompt_template", "answer_prefix", "chat_template_kwargs"),
)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairScores:
    """Log-probs per token (completion and stop token) of P held-out pairs."""

    ids: tuple[str, ...]
    chosen_P: np.ndarray  # float64
    rejected_P: np.ndarray  # float64

    @property
    def gap_P(self) -> np.ndarray:
        return self.chosen_P - self.rejected_P


@dataclass(frozen=True)
class EvalResult:
    """What P problems with N samples each came to, in the order of the dataset."""

    model: str
    problem_ids: tuple[str, ...]
    verdict_PN: np.ndarray  # of VERDICTS
    finished_PN: np.ndarray  # bool; an unfinished sample is wrong
    num_tokens_PN: np.ndarray  # float64; stop token included; NaN where a server did not count
    pairs: PairScores | None = None
    group_PN: np.ndarray | None = None  # int: samples with one answer; 0 right, -1 no answer
    settings: Mapping[str, Any] = field(default_factory=dict)  # those of SETTINGS

    @property
    def correct_PN(self) -> np.ndarray:
        return self.finished_PN & (self.verdict_PN == "correct")

    @property
    def pass_at_1(self) -> float:
        return float(self.correct_PN.mean())

    @property
    def mean_tokens(self) -> float | None:
        known = self.num_tokens_PN[~np.isnan(self.num_tokens_PN)]
        return float(known.mean()) if len(known) else None

    @property
    def sem(self) -> float | None:
        """The paper's: standard deviation (ddof 0) of the N accuracies over the whole dataset,
        divided by sqrt(N). None for a single sample, which says nothing about spread."""
        accuracy_N = self.correct_PN.mean(axis=0)
        return float(accuracy_N.std() / sqrt(len(accuracy_N))) if len(accuracy_N) > 1 else None

    def pass_at(self, k: int) -> float:
        """Unbiased estimate of the chance that one of k samples is correct: the mean over problems
        of 1 - C(N - c, k) / C(N, k), c of a problem's N samples being correct."""
        n = self.correct_PN.shape[1]
        if not 1 <= k <= n:
            raise ValueError(f"pass@{k} needs 1 <= k <= {n}, the number of samples")
        chance = [1 - comb(n - c, k) / comb(n, k) for c in range(n + 1)]
        return float(np.mean([chance[c] for c in self.correct_PN.sum(axis=1)]))

    def majority_at(self, k: int) -> float | None:
        """How often the most frequent answer of k samples is right; None without votes.jsonl.

        Each k consecutive samples vote, as often as N allows; what is left over has no vote. Of t
        answers tied for the first place each counts 1/t, as if one were drawn. Samples without an
        answer that can be read, and unfinished ones, do not vote.
        """
        if self.group_PN is None:
            return None
        n = self.group_PN.shape[1]
        if not 1 <= k <= n:
            raise ValueError(f"majority@{k} needs 1 <= k <= {n}, the number of samples")
        chances = []
        for votes in self.group_PN[:, : n // k * k].reshape(-1, k).tolist():
            count = Counter(vote for vote in votes if vote >= 0)
            first = [vote for vote in count if count[vote] == max(count.values())]
            chances.append((0 in first) / max(len(first), 1))
        return float(np.mean(chances))

    def metrics(self) -> dict[str, Any]:
        """The figures of metrics.json."""
        num_problems, num_samples = self.correct_PN.shape
        ks = [2**i for i in range(num_samples.bit_length())]
        counts = Counter(self.verdict_PN.ravel().tolist())
        figures = {
            "model": self.model,
            "num_problems": num_problems,
            "num_samples": num_samples,
            "pass@1_sem": self.sem,
            **{f"pass@{k}": self.pass_at(k) for k in ks},
            **({} if self.group_PN is None else {f"majority@{k}": self.majority_at(k) for k in ks}),
            "unfinished": float(1 - self.finished_PN.mean()),
            "mean_tokens": self.mean_tokens,
            "verdicts": {v: counts[v] for v in VERDICTS if counts[v] or v != "refused"},
        }
        if self.pairs is not None:
            gap = bootstrap(self.pairs.gap_P)
            figures["pairs"] = {
                "num_pairs": len(self.pairs.ids),
                "logps/chosen": float(self.pairs.chosen_P.mean()),
                "logps/rejected": float(self.pairs.rejected_P.mean()),
                "gap": gap.mean,
                "gap_interval": [gap.low, gap.high],
                "chosen_above_rejected": float((self.pairs.gap_P > 0).mean()),
            }
        return figures


def bootstrap(values_P: np.ndarray, *, seed: int = 0, num_resamples: int = 10_000) -> Interval:
    """The mean of P independent values with its 95% percentile bootstrap interval."""
    rng = np.random.default_rng(seed)
    size = len(values_P)
    chunk = max(1, min(num_resamples, 2_000_000 // size))  # bounds the memory
    means = np.concatenate([
        values_P[rng.integers(size, size=(min(chunk, num_resamples - start), size))].mean(axis=1)
        for start in range(0, num_resamples, chunk)
    ])  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values_P.mean()), float(low), float(high))


@dataclass(frozen=True)
class SignTest:
    """Problems on which one model does better than the other; `p` is exact and two-sided."""

    better: int
    worse: int
    equal: int

    @property
    def p(self) -> float:
        """The chance of a split at least as uneven if each problem that differs were a coin toss:
        the sign test; with one sample a problem, McNemar's."""
        n, k = self.better + self.worse, min(self.better, self.worse)
        return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)


def sign_test(a: EvalResult, b: EvalResult) -> SignTest:
    """On how many problems more of `a`'s samples are right than of `b`'s, and fewer.

    Raises RediError when the two were not evaluated on the same problems.
    """
    values_a, values_b = _paired(a, b, "pass@1")
    better, worse = int((values_a > values_b).sum()), int((values_a < values_b).sum())
    return SignTest(better, worse, len(values_a) - better - worse)


def t_interval(values: Sequence[float]) -> Interval:
    """The mean of a few independent values with its 95% t-interval; NaN ends for a single one.
    Beyond ten values it is a little wider than it need be."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = T975[min(count - 1, len(T975)) - 1] * float(np.std(values, ddof=1)) / sqrt(count)
    return Interval(mean, mean - half, mean + half)


def paired_difference(
    a: EvalResult, b: EvalResult, metric: Metric = "pass@1", *, seed: int = 0
) -> Interval:
    """How much higher `metric` is for `a` than for `b`, with a 95% interval over the problems.

    Problems (or pairs, for "gap") are resampled with both models' values together. The interval is
    about these two models; it says nothing about training again with another seed.
    Raises RediError when the two were not evaluated on the same problems.
    """
    values_a, values_b = _paired(a, b, metric)
    return bootstrap(values_a - values_b, seed=seed)


def _paired(a: EvalResult, b: EvalResult, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    (ids_a, values_a), (ids_b, values_b) = _values(a, metric), _values(b, metric)
    if ids_a != ids_b:
        first = next((x for x in ids_a if x not in set(ids_b)), None) or next(
            (x for x in ids_b if x not in set(ids_a)), "their order"
        )
        raise RediError(
            f"{a.model} and {b.model} were evaluated on different problems ({len(ids_a)} and "
            f"{len(ids_b)}; first difference: {first}); evaluate both on the same dataset"
        )
    return values_a, values_b


def _values(result: EvalResult, metric: Metric) -> tuple[tuple[str, ...], np.ndarray]:
    if metric == "pass@1":
        return result.problem_ids, result.correct_PN.mean(axis=1)
    if result.pairs is None:
        raise RediError(f"{result.model} was evaluated without pairs_name: it has no log-prob gap")
    return result.pairs.ids, result.pairs.gap_P


def load_result(output_dir: str | os.PathLike) -> EvalResult:
    """A finished evaluation. Raises RediError when the folder holds none."""
    folder = Path(output_dir)
    file = folder / "metrics.json"
    if not file.exists():
        raise RediError(f"{folder}: no finished evaluation (metrics.json); run `redi eval` first")
    model = read_json(file).get("model")
    if not isinstance(model, str):
        raise RediError(f"{file}: not the figures of an evaluation (no `model`)")
    return read_result(folder, model)


def load_results(output_dir: str | os.PathLike) -> dict[str, EvalResult]:
    """The finished evaluations of a folder by benchmark; by "" if it is of one dataset only.

    Raises RediError when the folder holds none.
    """
    folder = Path(output_dir)
    inside = sorted(file.parent for file in folder.glob("*/metrics.json"))
    if (folder / "metrics.json").exists() or not inside:
        return {"": load_result(folder)}
    return {
        part.name: load_result(part) for part in inside if (part / "generations.jsonl").exists()
    }


# What the rows of an evaluation's files hold; more may be in them.
_SAMPLE = {"problem": int, "sample": int, "id": str, "verdict": str, "finished": bool,
           "num_tokens": (int, NoneType)}  # fmt: skip
_PAIR = {"id": str, "chosen": float, "rejected": float}
_VOTE = {"groups": list}


def _read_rows(file: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in file.open(encoding="utf-8")]
        if not rows:
            raise ValueError("no samples")
        if not all(isinstance(row, dict) and _holds(row, fields) for row in rows):
            raise ValueError("a row that is no sample")
    except (OSError, ValueError) as error:
        raise RediError(f"{file}: cannot be read ({error}); run the same redi eval again") from None
    return rows


def _holds(row: dict[str, Any], fields: Mapping[str, Any]) -> bool:
    return all(name in row and isinstance(row[name], kind) for name, kind in fields.items())


def read_result(folder: Path, model: str) -> EvalResult:
    """From the samples of an evaluation. Raises RediError unless every problem has all of them."""
    rows = _read_rows(folder / "generations.jsonl", _SAMPLE)
    rows.sort(key=lambda row: (row["problem"], row["sample"]))
    shape = (rows[-1]["problem"] + 1, max(row["sample"] for row in rows) + 1)
    there = [(row["problem"], row["sample"]) for row in rows]
    if there != [divmod(i, shape[1]) for i in range(shape[0] * shape[1])]:
        raise RediError(
            f"{folder / 'generations.jsonl'}: {len(set(there))} of {shape[0] * shape[1]} samples "
            "are there, once each or more often; run the same redi eval again, which makes the rest"
        )
    column = lambda key: np.array([row[key] for row in rows]).reshape(shape)
    pairs = None
    if (folder / "pairs.jsonl").exists():
        scored = _read_rows(folder / "pairs.jsonl", _PAIR)
        pairs = PairScores(
            tuple(row["id"] for row in scored),
            np.array([row["chosen"] for row in scored]),
            np.array([row["rejected"] for row in scored]),
        )
    ids = tuple(row["id"] for row in rows[:: shape[1]])
    groups = None
    if (folder / "votes.jsonl").exists():
        votes = [row["groups"] for row in _read_rows(folder / "votes.jsonl", _VOTE)]
        if [len(vote) for vote in votes] != [shape[1]] * shape[0]:
            raise RediError(
                f"{folder / 'votes.jsonl'}: votes on other samples; run the same redi eval again"
            )
        groups = np.array(votes)
    settings = {}
    if (file := folder / "evaluation.json").exists():
        found = read_json(file)
        config = found.get("config", {})
        if not isinstance(config, dict):
            raise RediError(f"{file}: not the settings of an evaluation; run redi eval again")
        found |= config
        settings = {key: found.get(key) for key in SETTINGS}
        settings["chat_template_kwargs"] = settings["chat_template_kwargs"] or None
    verdicts, finished, num_tokens = map(column, ("verdict", "finished", "num_tokens"))
    num_tokens = num_tokens.astype(np.float64)  # None becomes NaN
    return EvalResult(model, ids, verdicts, finished, num_tokens, pairs, groups, settings)
