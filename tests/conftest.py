"""The longest file first, so that under pytest-xdist no worker is left alone with it at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_triton.py")
