"""What all tests share: reproducible hypothesis runs, the tested tree, and the gpu marker.

There is no ``__init__.py`` in tests/: pytest then puts tests/ itself on the path, so that a test
file can say ``from strategies import ...``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Timing of one example says nothing on a shared machine and while numba compiles. Under CI the
# same examples come every time, so that a red run is the fault of the change at hand.
settings.register_profile("polarpack", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("polarpack")

# Child processes (the command line, writers that get killed, ray and DDP workers) test the same
# tree as this one.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests where there is no CUDA device; torch is loaded only to ask for one."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT
