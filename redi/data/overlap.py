"""Which training problems are in an evaluation set, or nearly so.

As the paper's script compares: lower-case words split at white space, any 8 in a row in common.
Memory holds the evaluation sets' 8-grams only, however large the training data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from redi.data.files import read_rows
from redi.data.read import Prompt, problem_of
from redi.data.report import MAX_EXAMPLES, BuildReport, shorten

WORDS = 8


@dataclass
class Overlap:
    """The evaluation sets. `grams` and `exact` lead to (set, index of the problem in it)."""

    sets: dict[str, int] = field(default_factory=dict)  # number of problems
    grams: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    exact: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    texts: dict[tuple[str, int], str] = field(default_factory=dict)

    def read(self, paths: Sequence[str]) -> "Overlap":
        """Takes in evaluation sets. Raises RediError for a path or row that cannot be read."""
        for path in paths:
            self.sets[path] = 0
            for where, row in read_rows(path, mix_splits=True):
                at, text = (path, self.sets[path]), text_of(problem_of(row, where))
                self.sets[path] += 1
                self.texts[at] = shorten(text)
                words = text.lower().split()
                if words:
                    self.exact.setdefault(" ".join(words), []).append(at)
                for gram in _grams(words):
                    self.grams.setdefault(gram, []).append(at)
        return self

    def start(self, report: BuildReport) -> None:
        for name, number in self.sets.items():
            report.overlap[name] = {
                "problems": number,
                "rows exact": 0,
                "rows shared": 0,
                "problems shared": [],
                "examples": [],
            }

    def check(self, prompt: Prompt, where: str, id: str, report: BuildReport) -> bool:
        """Whether the problem shares 8 words, or all of them, with an evaluation set; counts it."""
        text = text_of(prompt)
        words = text.lower().split()
        exact = set(self.exact.get(" ".join(words), ()))
        shared = exact.union(*(self.grams.get(gram, ()) for gram in _grams(words)))
        for name in dict.fromkeys(name for name, _ in sorted(shared)):
            entry, mine = report.overlap[name], sorted(at for at in shared if at[0] == name)
            entry["rows shared"] += 1
            entry["rows exact"] += any(at in exact for at in mine)
            entry["problems shared"] = sorted({*entry["problems shared"], *(i for _, i in mine)})
            if len(entry["examples"]) < MAX_EXAMPLES:
                example = {"where": where, "id": id, "excerpt": shorten(text)}
                entry["examples"].append(example | {"evaluation": self.texts[mine[0]]})
        return bool(shared)


def text_of(prompt: Prompt) -> str:
    """The problem's text; of chat messages, what the user says."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] == "user")


def _grams(words: list[str]) -> list[str]:
    return [" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]
