"""The collapse guard: sees a run losing what the model knew, and says so or stops it.

Pushing rejected traces down can drag the chosen ones along (the paper's runs at alpha = 1, DPO and
SimPO at high rates): both log-probs fall together, answers no longer end. The loss does not show
it, being a difference of the two, and the gradient norm grows in healthy runs too.
"""

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WINDOW = 10  # steps whose median is compared: one odd batch moves nothing
FIRST = 5  # steps of the first median: a run may be lost within its warm-up
EARLY = 20  # steps that tell how much a metric jumps from batch to batch


@dataclass(frozen=True)
class Sign:
    """A metric that shows a collapse when its median over `WINDOW` steps is `limit` worse than the
    best such median the run has had; where batches differ much (three times the spread of a step's
    value, at most another `limit`), that much more."""

    key: str
    worse: int  # +1: larger is worse, -1: smaller is
    limit: float
    text: str


# Healthy runs stay inside, collapsing ones go far outside: the paper's chosen log-prob falls by
# 0.15 at alpha = 0.8, by 1.1 to 3.0 where it collapses; docs/training.md has the demo's figures.
SIGNS = (
    Sign("logps/chosen", -1, 0.5, "log-prob per token of the chosen traces"),
    Sign("logps/stop", -1, 1.0, "log-prob of the token that ends a chosen trace"),
    Sign("rejected_below_1e-4", +1, 0.5, "share of rejected tokens with p < 1e-4"),
    Sign("entropy", +1, 1.0, "entropy along chosen traces"),
)


class CollapseGuard:
    """Is shown every step's metrics, the same on all ranks, so all come to the same verdict.

    `history` is JSON and belongs into checkpoints: a resumed run judges as an uninterrupted one.
    """

    def __init__(self) -> None:
        self.history: dict[str, dict[str, Any]] = {}

    def watch(self, row: Mapping[str, float]) -> bool:
        """Whether this step is the first to cross the limit of some sign."""
        return any([self._crosses(sign, row[sign.key]) for sign in SIGNS if sign.key in row])

    def alarms(self) -> list[str]:
        """A sentence for each sign that has crossed its limit."""
        return [history["alarm"] for history in self.history.values() if history["alarm"]]

    def verdict(self) -> str:
        return (
            f"the model is losing what it knew: {'; '.join(self.alarms())}. "
            "Lower learning_rate or alpha."
        )

    def _crosses(self, sign: Sign, value: float) -> bool:
        history = self.history.setdefault(
            sign.key, {"early": [], "recent": [], "best": None, "alarm": ""}
        )
        early, recent = history["early"], history["recent"]
        if len(early) < EARLY:
            early.append(value)
        recent.append(value)
        del recent[:-WINDOW]
        if len(recent) < FIRST:
            return False
        now, best = statistics.median(recent), history["best"]
        if best is None or sign.worse * (now - best) < 0:
            history["best"] = best = now
        fall = sign.worse * (now - best)
        if history["alarm"] or fall <= limit(sign, early):
            return False
        history["alarm"] = f"{sign.text} was {best:.2g} and is {now:.2g} ({sign.key})"
        return True


def limit(sign: Sign, early: list[float]) -> float:
    """How much worse `sign` may get in a run whose first values were `early`."""
    return sign.limit + min(3 * _spread(early), sign.limit)


def _spread(values: list[float]) -> float:
    """Standard deviation of a step's value around the run's trend, from its jumps; odd ones weigh
    nothing."""
    jumps = [abs(b - a) for a, b in itertools.pairwise(values)]
    return 1.4826 * statistics.median(jumps) / 2**0.5
