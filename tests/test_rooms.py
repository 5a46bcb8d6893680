"""Rooms of redi: which may know which."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1] / "redi"
IMPORT = re.compile(r"^\s*(?:from|import) redi\.(\w+)", re.M)
# Each may import those after it; what else stands in redi/ serves them all.
ORDER = ["cli", "study", "run", "pages", "evaluation", "training", "data", "grading"]


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_arrows_point_one_way():
    against = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in ROOT.rglob("*.py")
        for name in IMPORT.findall(file.read_text(encoding="utf-8"))
        if room(file) in ORDER and name in ORDER and ORDER.index(name) < ORDER.index(room(file))
    ]
    assert against == []


def test_no_room_uses_what_another_keeps_to_itself():
    private = re.compile(r"from (redi(?:_kernels)?(?:\.\w+)*) import [^\n]*\b_[a-z]\w*")
    found = [
        f"{file.relative_to(ROOT)}: {line}"
        for file in ROOT.rglob("*.py")
        for line in private.findall(file.read_text(encoding="utf-8"))
    ]
    assert found == []
