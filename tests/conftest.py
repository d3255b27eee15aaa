"""Makes `support` importable from every folder of tests: pytest puts the folder of a conftest.py on the path."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# the same examples in every run: a failure is a change of the code, never luck
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


# kernels are made when they are imported: without a GPU, Triton's interpreter runs them on the CPU
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped, by name, where there is no such device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
