"""Other people's kernels for the nearest equivalent of each op; each is imported only when its turn comes.

None computes exactly our function (another neuron, another activation), so none is checked against our reference: their
rows say what the same amount of recurrence, memory or decoding costs elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurogen.benchmark.harness import Contender

Prepare = Callable[[torch.device], Callable[[], Any]]


def _both(forward: Callable[[], Tensor], leaves: list[Tensor], *, backward: bool) -> Callable[[], Any]:
    if not backward:

        def run_forward() -> Tensor:
            with torch.no_grad():
                return forward()

        return run_forward
    grad = torch.randn_like(forward().detach())

    def run_both() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    return run_both


def cortex_peers(
    lanes: int, tokens: int, width: int, column_width: int, dtype: torch.dtype, *, backward: bool
) -> list[Contender]:
    """Recurrent networks of the same width: a dense LSTM, block-diagonal ones, spiking multi-step neurons."""
    blocks = width // column_width

    def dense_lstm(device: torch.device) -> Callable[[], Any]:
        lstm = nn.LSTM(width, width).to(device, dtype)
        lstm.flatten_parameters()
        x = torch.randn(tokens, lanes, width, device=device, dtype=dtype, requires_grad=True)
        return _both(lambda: lstm(x)[0], [x, *lstm.parameters()], backward=backward)

    def flashrnn(function: str, gates: int, backend: str) -> Prepare:
        def prepare(device: torch.device) -> Callable[[], Any]:
            from flashrnn.flashrnn import flashrnn as run

            new: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
            wx = torch.randn(lanes, tokens, gates, blocks, column_width, **new)
            recurrent = torch.randn(gates, blocks, column_width, column_width, **new)
            bias = torch.zeros(gates, blocks, column_width, **new)
            named = {"function": function, "backend": backend, "dtype": str(dtype).removeprefix("torch.")}
            return _both(lambda: run(wx, recurrent, bias, **named)[0][0], [wx, recurrent, bias], backward=backward)

        return prepare

    def spikingjelly(backend: str) -> Prepare:
        def prepare(device: torch.device) -> Callable[[], Any]:
            from spikingjelly.activation_based import functional, neuron, surrogate

            node = neuron.LIFNode(tau=2.0, v_reset=None, surrogate_function=surrogate.ATan(), step_mode="m").to(device)
            node.backend = backend
            x = torch.randn(tokens, lanes, width, device=device, dtype=dtype, requires_grad=True)

            def forward() -> Tensor:
                functional.reset_net(node)
                return node(x)

            return _both(forward, [x], backward=backward)

        return prepare

    def snntorch(device: torch.device) -> Callable[[], Any]:
        import snntorch

        node = snntorch.Leaky(beta=0.9).to(device)
        x = torch.randn(tokens, lanes, width, device=device, dtype=dtype, requires_grad=True)

        def forward() -> Tensor:
            membrane, out = node.reset_mem(), []
            for x_t in x.unbind(0):
                spikes, membrane = node(x_t, membrane)
                out.append(spikes)
            return torch.stack(out)

        return _both(forward, [x], backward=backward)

    # FlashRNN is not recorded, and comes last: a replay of it once ended the process's use of the GPU. (Whether that
    # was its doing is not known: recorded work did not keep its inputs then.)
    return [
        Contender("cuDNN LSTM, dense", dense_lstm),
        Contender("SpikingJelly LIF, Triton, no lateral weights", spikingjelly("triton")),
        Contender("SpikingJelly LIF, torch, no lateral weights", spikingjelly("torch")),
        Contender("snnTorch Leaky, no lateral weights", snntorch),
        Contender("FlashRNN LSTM, CUDA alternating", flashrnn("lstm", 4, "cuda"), recordable=False),
        Contender("FlashRNN LSTM, CUDA fused", flashrnn("lstm", 4, "cuda_fused"), recordable=False),
        Contender("FlashRNN sLSTM, Triton fused", flashrnn("slstm", 4, "triton_fused"), recordable=False),
    ]


def memory_peers(
    lanes: int, tokens: int, heads: int, head_width: int, dtype: torch.dtype, *, rule: str, backward: bool
) -> list[Contender]:
    """FLA's chunk kernels for the same rule, and the quadratic form as plain torch writes it."""

    def inputs(device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
        new: dict[str, Any] = {"device": device, "requires_grad": True}
        q, k, v = (torch.randn(lanes, tokens, heads, head_width, dtype=dtype, **new) for _ in range(3))
        forget = (4 + torch.randn(lanes, tokens, heads, device=device)).requires_grad_()
        write = torch.randn(lanes, tokens, heads, **new)
        return [q, k, v], forget, write

    def fla_hebbian(device: torch.device) -> Callable[[], Any]:
        from fla.ops.simple_gla import chunk_simple_gla

        (q, k, v), forget, _ = inputs(device)

        def forward() -> Tensor:
            query, key = (F.normalize(F.silu(z), dim=-1) for z in (q, k))
            return chunk_simple_gla(query, key, v, g=F.logsigmoid(forget), scale=1.0)[0]

        return _both(forward, [q, k, v, forget], backward=backward)

    def fla_hebbian_core(device: torch.device) -> Callable[[], Any]:
        from fla.ops.simple_gla import chunk_simple_gla

        (q, k, v), forget, _ = inputs(device)
        with torch.no_grad():
            query, key, log_decay = F.normalize(q, dim=-1), F.normalize(k, dim=-1), F.logsigmoid(forget)
        leaves = [z.detach().requires_grad_() for z in (query, key, v, log_decay)]
        return _both(lambda: chunk_simple_gla(*leaves[:3], g=leaves[3], scale=1.0)[0], leaves, backward=backward)

    def fla_delta(device: torch.device) -> Callable[[], Any]:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        (q, k, v), forget, write = inputs(device)

        def forward() -> Tensor:
            return chunk_gated_delta_rule(
                F.silu(q),
                F.silu(k),
                v,
                g=F.logsigmoid(forget),
                beta=torch.sigmoid(write),
                scale=1.0,
                use_qk_l2norm_in_kernel=True,
            )[0]

        return _both(forward, [q, k, v, forget, write], backward=backward)

    if rule == "delta":
        return [Contender("FLA chunk_gated_delta_rule, with silu", fla_delta)]
    return [
        Contender("FLA chunk_simple_gla, with silu and l2norm in torch", fla_hebbian),
        Contender("FLA chunk_simple_gla, kernel alone", fla_hebbian_core),
    ]


def decode_peers(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> list[Contender]:
    """Linear decoder and cross-entropy, forward and backward, with exact gradients."""

    def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(vocabulary, width, device=device) / math.sqrt(width)).to(dtype).requires_grad_()
        return hidden, weight, torch.randint(0, vocabulary, (rows,), device=device)

    def plain(device: torch.device) -> Callable[[], Any]:
        hidden, weight, targets = inputs(device)
        return _both(
            lambda: F.cross_entropy(F.linear(hidden, weight).float(), targets), [hidden, weight], backward=True
        )

    def native(device: torch.device) -> Callable[[], Any]:
        hidden, weight, targets = inputs(device)
        function = F.linear_cross_entropy  # in newer releases of torch
        return _both(lambda: function(hidden, weight, targets), [hidden, weight], backward=True)

    def liger(device: torch.device) -> Callable[[], Any]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        hidden, weight, targets = inputs(device)
        loss = LigerFusedLinearCrossEntropyLoss()
        return _both(lambda: loss(weight, hidden, targets), [hidden, weight], backward=True)

    def cut_cross_entropy(device: torch.device) -> Callable[[], Any]:
        from cut_cross_entropy import linear_cross_entropy

        hidden, weight, targets = inputs(device)
        return _both(
            lambda: linear_cross_entropy(hidden, weight, targets, filter_eps=None), [hidden, weight], backward=True
        )

    return [
        Contender("torch linear + cross_entropy", plain),
        Contender("torch linear_cross_entropy", native),
        Contender("Liger", liger),
        Contender("cut-cross-entropy, exact", cut_cross_entropy),
    ]
