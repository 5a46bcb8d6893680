"""What an installation exposes, and the `kernels/` folder's guard rails (see CONTRIBUTING.md).

transformers probes for a pip package called `kernels`. Our folder of that name sits in the working
directory of everyone who runs from a checkout, so it must never become importable code.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import floors
import pytest

ROOT = Path(__file__).parents[1]
TINY_MODEL = """
from transformers import Qwen2Config, Qwen2ForCausalLM
Qwen2ForCausalLM(Qwen2Config(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1,
))
"""


def python(code: str, cwd: Path, *paths: Path) -> str:
    """Runs `code` in a fresh interpreter started in `cwd`, which is on its sys.path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    env.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_a_plain_folder() -> None:
    strays = [p.name for p in (ROOT / "kernels").iterdir() if p.suffix == ".py"]
    assert strays == []
    # With a test in there, pytest's importlib mode would put a dummy `kernels` into sys.modules.
    modules = (ROOT / "kernels").rglob("*.py")
    assert [m.name for m in modules if m.name.startswith(("test_", "conftest"))] == []


def test_transformers_in_the_checkout_does_not_pick_up_our_folder() -> None:
    show = "import sys; print(getattr(sys.modules.get('kernels'), '__file__', None))"
    found = python(TINY_MODEL + show, ROOT)
    assert found == "None" or "site-packages" in found


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    found = python(TINY_MODEL + "import kernels; print(kernels.__file__)", ROOT, tmp_path)
    assert found == str(tmp_path / "kernels" / "__init__.py")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of a wheel built offline from a copy of the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for package in ("redi", "kernels"):
        for file in (ROOT / package).rglob("*.*"):
            if file.suffix == ".pyc" or not file.is_file():
                continue
            target = copy / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(out),
            str(copy),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = out.glob("reinforcement_distillation-*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_installs_exactly_two_top_level_names(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"redi", "redi_kernels"}


def test_wheel_holds_the_templates_of_the_pages(wheel_names: list[str]) -> None:
    templates = {
        f"redi/pages/templates/{p.name}" for p in (ROOT / "redi" / "pages" / "templates").iterdir()
    }
    assert templates and templates <= set(wheel_names)


def test_wheel_holds_every_module(wheel_names: list[str]) -> None:
    ours = [*(ROOT / "redi").rglob("*.py"), *(ROOT / "kernels" / "redi_kernels").rglob("*.py")]
    expected = {str(p.relative_to(ROOT)).removeprefix("kernels" + os.sep) for p in ours}
    assert expected == {name for name in wheel_names if name.endswith(".py")}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("redi", ["transformers", "triton", "math_verify", "matplotlib", "datasets", "peft"]),
        ("redi_kernels", ["transformers", "triton", "trl", "peft", "redi"]),
        ("redi_kernels.hf", ["transformers", "triton", "trl", "peft", "redi"]),
    ],
)
def test_import_stays_light(package: str, forbidden: list[str], tmp_path: Path) -> None:
    loaded = python(f"import sys, {package}; print(*sys.modules)", tmp_path).split()
    assert package in loaded
    assert [name for name in forbidden if name in loaded] == []


def test_every_requirement_names_its_oldest_version(tmp_path: Path) -> None:
    """`make test-oldest` installs what this reads out of setup.py, and nothing else says it."""
    found = floors.floors()
    assert {"torch", "triton", "transformers", "numpy", "trl", "tensorboard"} <= set(found)
    assert len(found) == len(floors.requirements())
    missing = tmp_path / "setup.py"
    missing.write_text(
        "from setuptools import setup\nsetup(install_requires=['numpy'], extras_require={})\n"
    )
    with pytest.raises(ValueError, match="'numpy' names no oldest version"):
        floors.floors(missing)
