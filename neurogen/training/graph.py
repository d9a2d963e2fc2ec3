"""A training step as one CUDA graph: recorded once, replayed with new contents of the same tensors."""

import functools
from collections.abc import Callable
from typing import Any

import torch

NUM_WARMUP_STEPS = 3  # compile kernels and let lazily made buffers settle before recording


def capture(step: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Record `step` and return its replay.

    Arguments:
        step: reads and writes the same tensors at every call (inputs copied into buffers of their own, gradients and
            optimiser state kept), synchronises with the host nowhere, and draws no random numbers on the host.
        device: a CUDA device.

    Returns:
        A function that runs the recorded launches again, and keeps `step`, whose tensors they read. `step` itself runs
        NUM_WARMUP_STEPS times before recording, so a caller that counts updates captures before its first or restores
        what those changed.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(NUM_WARMUP_STEPS):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return functools.partial(_replay, graph, step)


def end_failed_capture(device: torch.device) -> None:
    """After a recording that failed. torch then leaves its random generator in the state of one that is recorded, and
    refuses every draw; a recording that succeeds ends that."""
    scratch = torch.zeros(1, device=device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        scratch.add_(1.0)


def _replay(graph: torch.cuda.CUDAGraph, step: Callable[[], Any]) -> None:
    graph.replay()
