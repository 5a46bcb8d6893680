"""Runs the Python on a docs page, so that what people copy is what the tests test."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def run_section(page: str, heading: str, *, block: int = 0, **names) -> dict:
    """Executes one block of code under `## heading`, with `names` defined; returns its globals."""
    text = (DOCS / page).read_text()
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    (section,) = [s for s in section if s.startswith(heading + "\n")]
    code = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)[block]
    names["__name__"] = f"{page}: {heading}"
    exec(compile(code, names["__name__"], "exec"), names)
    return names
