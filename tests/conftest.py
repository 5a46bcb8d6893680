"""What the marks of pyproject.toml mean here, and which file goes first."""

import sys

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    # The longest files first: under pytest-xdist no worker is left alone with one at the end.
    items.sort(key=lambda item: item.path.parent.name != "triton_interpreted")
    if sys.platform != "linux":  # Triton has no builds for it: these tests have no subject there
        off = [item for item in items if item.get_closest_marker("linux")]
        items[:] = [item for item in items if item not in off]
        config.hook.pytest_deselected(items=off)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
