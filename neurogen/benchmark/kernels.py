"""The kernels suite: every fused op against its reference and against the nearest peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.cortex import CortexState, cortex
from kernels.decode import decode
from kernels.memory import memory
from kernels.relay import NO_TOKEN, relay
from neurogen.benchmark import peers
from neurogen.benchmark.harness import Contender

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One table row's work: an op at a shape, and who competes.

    Arguments:
        op: name of the op and the pass, such as `cortex forward`.
        shape: sizes by letter.
        dtype: storage type.
        contenders: ours first.
        extra: derived figures from a median time in seconds.
        cold, min_rounds, record: as for `compare`.
    """

    op: str
    shape: dict[str, int | str]
    dtype: torch.dtype
    contenders: list[Contender]
    extra: Callable[[float], dict[str, float]]
    cold: bool = True
    min_rounds: int = 10
    record: bool = False


@dataclass(frozen=True)
class Op:
    """A differentiable op on fixed inputs: `inputs` in float32 on the CPU, and what runs them on a backend."""

    inputs: Tensors
    stored: frozenset[str]
    run: Callable[[Tensors, str], Tensor]

    def on(self, device: torch.device, dtype: torch.dtype, backend: str) -> Tensors:
        def place(name: str, value: Tensor) -> Tensor:
            value = value.to(device)
            if name in self.stored:
                value = value.to(dtype)  # the float64 reference sees the same rounded numbers
            return (value.double() if backend == "float64" else value).requires_grad_()

        return {name: place(name, value) for name, value in self.inputs.items()}


def op_contenders(op: Op, dtype: torch.dtype, *, backward: bool) -> list[Contender]:
    """The fused op, checked against float64, and the reference."""

    def prepare(backend: str) -> Callable[[torch.device], Callable[[], Any]]:
        def build(device: torch.device) -> Callable[[], Any]:
            inputs = op.on(device, dtype, backend)
            return timed(lambda: op.run(inputs, backend), inputs, backward=backward)

        return build

    def error(device: torch.device) -> float:
        results = []
        for backend in ("fused", "float64"):
            inputs = op.on(device, dtype, backend)
            out = op.run(inputs, "reference" if backend == "float64" else backend)
            values = [out.detach()]
            if backward:
                weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
                values = list(torch.autograd.grad((out.double() * weight).sum(), list(inputs.values())))
            results.append([value.double() for value in values])
            del inputs, out
        return max(float((got - want).norm() / want.norm().clamp_min(1e-30)) for got, want in zip(*results))

    return [
        Contender("neurogen fused", prepare("fused"), error),
        Contender("neurogen reference", prepare("reference")),
    ]


def timed(forward: Callable[[], Tensor], inputs: Tensors, *, backward: bool) -> Callable[[], Any]:
    """The forward alone, without a graph; or forward and backward from a fixed random gradient."""
    if not backward:

        def run_forward() -> Tensor:
            with torch.no_grad():
                return forward()

        return run_forward

    grad = torch.randn_like(forward().detach())

    def run_both() -> None:
        torch.autograd.grad(forward(), list(inputs.values()), grad)

    return run_both


def cases(*, small: bool) -> Iterator[Case]:
    """The suite; `small` shrinks every shape to what a CPU in Triton's interpreter can do, to test the suite itself."""
    dtype = torch.float32 if small else torch.bfloat16
    for make in (_cortex_cases, _memory_cases, _decode_cases, _relay_cases):
        for case in make(dtype, small=small):
            yield dataclasses.replace(case, record=True)


def _cortex_cases(dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    for column_width in (16,) if small else (64, 128):
        lanes, tokens, width = (2, 3, 32) if small else (64, 512, 1536)
        num_columns = width // column_width
        inputs = {
            "drive": torch.randn(lanes, tokens, width) + 0.5,
            "lateral_weight": torch.randn(num_columns, column_width, column_width) * 0.5 / column_width**0.5,
            "decay": torch.exp(-1 / torch.logspace(0.2, 2.3, width)),
        }

        def run(x: Tensors, backend: str) -> Tensor:
            drive = x["drive"]
            dtype = torch.float64 if drive.dtype == torch.float64 else torch.float32
            zeros = [torch.zeros(drive.shape[0], drive.shape[2], dtype=dtype, device=drive.device) for _ in range(3)]
            return cortex(drive, x["lateral_weight"], x["decay"], CortexState(*zeros), backend=backend).spikes

        op = Op(inputs, frozenset({"drive"}), run)
        shape: dict[str, int | str] = {"B": lanes, "T": tokens, "D": width, "C": column_width}
        for backward in (False, True):
            contenders = op_contenders(op, dtype, backward=backward)
            contenders += peers.cortex_peers(lanes, tokens, width, column_width, dtype, backward=backward)
            yield Case(
                f"cortex {_pass(backward)}",
                shape,
                dtype,
                contenders,
                _us_per_step(tokens),
            )


def _memory_cases(dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    for rule in ("hebbian", "delta"):
        for heads, head_width in ((2, 16),) if small else ((12, 128), (24, 64)):
            lanes, tokens = (2, 5) if small else (32, 1024)
            inputs = {name: torch.randn(lanes, tokens, heads, head_width) for name in ("query", "key", "value")}
            inputs["forget_logit"] = 4.0 + torch.randn(lanes, tokens, heads)
            if rule == "delta":
                inputs["write_logit"] = torch.randn(lanes, tokens, heads)

            def run(x: Tensors, backend: str, rule: str = rule) -> Tensor:
                value = x["value"]
                dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
                lanes, _, heads, width = value.shape
                state = torch.zeros(lanes, heads, width, width, dtype=dtype, device=value.device)
                logits = (x["forget_logit"], x.get("write_logit"))
                return memory(x["query"], x["key"], value, *logits, state, rule=rule, backend=backend)[0]

            op = Op(inputs, frozenset({"query", "key", "value"}), run)
            for backward in (False, True):
                contenders = op_contenders(op, dtype, backward=backward)
                contenders += peers.memory_peers(lanes, tokens, heads, head_width, dtype, rule=rule, backward=backward)
                yield Case(
                    f"memory {rule} {_pass(backward)}",
                    {"B": lanes, "T": tokens, "H": heads, "N": head_width},
                    dtype,
                    contenders,
                    _tokens_per_second(lanes * tokens),
                )


def _decode_cases(dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    for rows in (7,) if small else (8192, 32768):
        width, vocabulary = (32, 67) if small else (1536, 50257)
        inputs = {
            "hidden": torch.randn(rows, width),
            "weight": torch.randn(vocabulary, width) / width**0.5,
        }
        targets = torch.randint(0, vocabulary, (rows,))

        def run(x: Tensors, backend: str, targets: Tensor = targets) -> Tensor:
            return decode(x["hidden"], x["weight"], targets.to(x["hidden"].device), backend=backend).loss

        op = Op(inputs, frozenset({"hidden", "weight"}), run)
        flops = 6 * rows * vocabulary * width
        contenders = op_contenders(op, dtype, backward=True)
        contenders += peers.decode_peers(rows, width, vocabulary, dtype)
        yield Case(
            "decode forward+backward",
            {"N": rows, "D": width, "V": vocabulary},
            dtype,
            contenders,
            _useful_tflops(flops),
        )


def _relay_cases(dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    lanes, tokens, width, vocabulary = (2, 5, 32, 67) if small else (64, 512, 1536, 50257)
    ids = torch.randint(0, vocabulary, (lanes, tokens))
    recent = torch.full((lanes, 3), NO_TOKEN)
    inputs = {"embedding": torch.randn(vocabulary, width), "taps": torch.randn(4, width)}

    def run(x: Tensors, backend: str) -> Tensor:
        device = x["embedding"].device
        return relay(ids.to(device), x["embedding"], x["taps"], recent.to(device), backend=backend)[0]

    op = Op(inputs, frozenset(), run)
    for backward in (False, True):
        yield Case(
            f"relay {_pass(backward)}",
            {"B": lanes, "T": tokens, "D": width, "V": vocabulary},
            dtype,
            op_contenders(op, dtype, backward=backward),
            _tokens_per_second(lanes * tokens),
        )


Extra = Callable[[float], dict[str, float]]


def _us_per_step(tokens: int) -> Extra:
    return lambda seconds: {"us_per_step": seconds / tokens * 1e6}


def _tokens_per_second(tokens: int) -> Extra:
    return lambda seconds: {"tokens_per_second": tokens / seconds}


def _useful_tflops(flops: int) -> Extra:
    return lambda seconds: {"useful_tflops": flops / seconds / 1e12}


def _pass(backward: bool) -> str:
    return "forward+backward" if backward else "forward"
