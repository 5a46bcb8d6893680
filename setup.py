"""The distribution `reinforcement-distillation`: packages `redi` and `redi_kernels`.

Everything about packaging stands here, the version too (`redi.__version__` asks the installed
metadata). pyproject.toml only configures the tools. Every requirement names its oldest version, and
`make test-oldest` runs the tests with exactly those.
"""

from pathlib import Path

from setuptools import setup

VERSION = "0.1.0"

TRITON = 'triton>=3.6; platform_system == "Linux"'
LIGER = 'liger-kernel>=0.8.1; platform_system == "Linux"'

EXTRAS = {
    "gpu": [TRITON],  # flash-attn is built by hand, see README.md
    "data": ["math-verify>=0.9"],
    "plot": ["matplotlib>=3.9.2"],
    "liger": [LIGER],  # RMSNorm, RoPE and SwiGLU on a GPU
    "lora": ["peft>=0.19"],
    "track": ["tensorboard>=2.18", "trackio>=0.30"],
}
EXTRAS["dev"] = [
    # All that the tests need, so that only tests for an NVIDIA GPU are skipped.
    *EXTRAS["data"],
    *EXTRAS["plot"],
    *EXTRAS["lora"],
    TRITON,  # its interpreter runs the GPU kernels' tests on a CPU, Liger's too
    LIGER,
    "build>=1.2.1",
    "hypothesis>=6.120",
    "mypy>=1.13",
    "pytest>=8.3",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6.1",
    "ruff>=0.8",
    "setuptools>=77.0.3",  # the wheel test builds without isolation
    "trl>=1.16,<2",
    "types-PyYAML>=6.0.12",
]

setup(
    name="reinforcement-distillation",
    version=VERSION,
    description="Train language models on right and wrong reasoning traces (REDI), packed and fast",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # `kernels/` is a plain folder: as a package it would shadow the pip package of that name.
    package_dir={"redi": "redi", "redi_kernels": "kernels/redi_kernels"},
    packages=[
        "redi",
        "redi.config",
        "redi.data",
        "redi.evaluation",
        "redi.grading",
        "redi.pages",
        "redi.study",
        "redi.training",
        "redi_kernels",
        "redi_kernels.triton",
    ],
    package_data={"redi.pages": ["templates/*"]},
    install_requires=[
        "jinja2>=3.1.4",
        "torch>=2.11",
        "transformers>=5.17",
        "numpy>=2.1",
        "pyarrow>=21",
        "pydantic>=2.10",
        "pyyaml>=6.0.2",
        "rich>=13.9",
        "safetensors>=0.8",
        "typer>=0.20",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["redi = redi.cli:main"]},
)
