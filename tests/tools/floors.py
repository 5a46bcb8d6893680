"""The oldest version that setup.py allows of each requirement, for `make test-oldest`.

    python tests/tools/floors.py            all, as pip's constraints: "numpy==2.1"
    python tests/tools/floors.py torch      one of them, the version alone

Runs on a bare Python, which since 3.12 has no setuptools: setup() is replaced by a listener.
"""

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

SETUP = Path(__file__).parents[2] / "setup.py"


def requirements(setup_file: Path = SETUP) -> list[str]:
    """Everything that `setup_file` requires, the extras' too, without repeats."""
    heard: dict = {}
    listener = ModuleType("setuptools")
    listener.setup = heard.update  # type: ignore[attr-defined]
    before = sys.modules.get("setuptools")
    sys.modules["setuptools"] = listener
    try:
        runpy.run_path(str(setup_file))
    finally:
        del sys.modules["setuptools"]
        if before is not None:
            sys.modules["setuptools"] = before
    extras = heard["extras_require"].values()
    return list(dict.fromkeys([*heard["install_requires"], *(r for e in extras for r in e)]))


def floors(setup_file: Path = SETUP) -> dict[str, str]:
    """Name -> oldest version. ValueError for a requirement that names none."""
    found = {}
    for requirement in requirements(setup_file):
        match = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if match is None:
            raise ValueError(f"{setup_file.name}: {requirement!r} names no oldest version (>=)")
        found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(floors()[sys.argv[1]])
    else:
        print("\n".join(f"{name}=={version}" for name, version in floors().items()))
