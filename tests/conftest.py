"""Shared by all tests: kernels run in Triton's interpreter where there is no GPU, and GPU tests skip there; one small
model with weights that make every path matter."""

import kernels.launch  # noqa: I001  first: it chooses the interpreter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

if kernels.launch.INTERPRETED:
    import interpreter_speed

    interpreter_speed.patch_once_a_launch()

SMALL = {"embedding_dim": 24, "column_width": 8, "head_width": 6}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _leave_room_on_the_gpu() -> Iterator[None]:
    """Tests run in several processes share one GPU: what one has freed, the next of another process can have."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(vocab_size=11, dtype=torch.float64, mode="unfused", seed=0, **config)`.

    A new network's output projections, gates and taps start where they do nothing; noise on every weight, the same for
    the same seed and config, makes each of them count.
    """
    from neurogen import BrainConfig, NeuroGen

    def make(
        *, vocab_size: int = 11, dtype: torch.dtype = torch.float64, mode: str = "unfused", seed: int = 0, **config: Any
    ) -> NeuroGen:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = NeuroGen(BrainConfig(**SMALL | config), vocab_size=vocab_size, mode=mode)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model.to(dtype)

    return make
