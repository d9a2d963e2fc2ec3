"""Shared by all tests: kernels run in Triton's interpreter where there is no GPU, and GPU tests skip there."""

import kernels.launch  # noqa: F401, I001  first: it chooses the interpreter
import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
