"""The generation suite: replies of ours in one launch and token by token, and of a GPT with a cache of equal size."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neurogen.baselines import GPT, GPTConfig, KeyValueCache
from neurogen.benchmark.bandwidth import read_rate
from neurogen.benchmark.harness import Contender
from neurogen.benchmark.kernels import Case
from neurogen.benchmark.token_steps import (
    SEED,
    Launched,
    Replayed,
    brain_step,
    compiled,
    gpt_step,
)
from neurogen.brain import BrainConfig, BrainState
from neurogen.generation.packing import brain_shape
from neurogen.generation.prompts import read
from neurogen.model import NeuroGen
from neurogen.training.graph import NUM_WARMUP_STEPS
from neurogen.training.rounding import round_weights

Reply = tuple[Tensor, Tensor]  # tokens and log-probabilities, [B, N] each
CHECKED_LANES = 4


@dataclass(frozen=True)
class Workload:
    """A model size, what it has read, and the reply asked for; `gpt` has about as many parameters."""

    name: str
    brain: BrainConfig
    gpt: GPTConfig
    vocab_size: int
    context: int
    lanes: int
    num_tokens: int
    dtype: torch.dtype

    @property
    def shape(self) -> dict[str, int | str]:
        return {
            "B": self.lanes,
            "context": self.context,
            "N": self.num_tokens,
            "D": self.brain.embedding_dim,
            "V": self.vocab_size,
        }


def workloads(*, small: bool) -> Iterator[Workload]:
    """The shapes of the published targets, or with `small` one that a CPU can do, to test the suite itself."""
    if small:
        yield Workload("test", BrainConfig(32, 16, 16), GPTConfig(32, 2, 16), 67, 5, 2, 2, torch.float32)
        return
    sizes = (
        ("base", BrainConfig(1536, 128, 128, 1, 2, 2, 1), GPTConfig(1536, 6, 128), 50257),
        ("small", BrainConfig(512, 64, 64, 1, 2, 2, 1), GPTConfig(512, 6, 64), 257),
    )
    for name, brain, gpt, vocab_size in sizes:
        for context in (128, 1024, 8192, 65536):
            for lanes in (1, 4, 16, 64):
                yield Workload(name, brain, gpt, vocab_size, context, lanes, 128, torch.bfloat16)
        # Of 128 tokens, what a call costs besides them is a tenth.
        yield Workload(f"{name} long", brain, gpt, vocab_size, 128, 1, 1024, torch.bfloat16)


def cases(*, small: bool) -> Iterator[Case]:
    """Every workload with the L2 cache cold and warm; `only="base, context 128, batch 1,"` picks one."""
    for work in workloads(small=small):
        torch.compiler.reset()  # a new shape, not a recompilation of the last one
        ways = [*brain_ways(work), *gpt_ways(work)]
        for cold in (True, False):
            yield Case(
                f"generate {work.name}, context {work.context}, batch {work.lanes}, L2 {'cold' if cold else 'warm'}",
                work.shape,
                work.dtype,
                [way.contender() for way in ways],
                lambda seconds: {},
                cold=cold,
                min_rounds=2 if small else 10,
            )


@dataclass
class Way:
    """One way of making the reply. Cold and warm share what `make` built.

    Arguments:
        make: from the device to the work, called with gradients off and autocast on.
        bytes_per_step: read and written at least for one token of every lane.
        check: whether its log-probabilities are compared with the float32 model's.
        weights: what matrices are rounded to, those of the float32 model that it is compared with too.
    """

    provider: str
    work: Workload
    make: Callable[[torch.device], Callable[[], Reply]]
    bytes_per_step: int
    check: bool
    weights: str | None = None
    _built: dict[torch.device, Callable[[], Reply]] = field(default_factory=dict)

    def contender(self) -> Contender:
        return Contender(self.provider, self.build, self.error if self.check else None, extra=self.figures)

    def build(self, device: torch.device) -> Callable[[], Reply]:
        if device not in self._built:
            read_rate(device)  # while there is room: a cache may fill the device
            with arithmetic(device, self.work.dtype):
                run = self.make(device)

            def inside() -> Reply:
                with arithmetic(device, self.work.dtype):
                    return run()

            self._built[device] = inside
        return self._built[device]

    def error(self, device: torch.device) -> float:
        """norm(ours - theirs) / norm(theirs) of the log-probabilities of the reply's own tokens; theirs are those of
        the float32 model, which reads the reply as one sequence."""
        tokens, log_probs = self.build(device)()
        lanes = min(self.work.lanes, CHECKED_LANES)
        model = copy.deepcopy(make_brain(self.work, device, "unfused")).float()
        if self.weights is not None:
            round_weights(model, self.weights)
        ids = torch.cat([first_ids(self.work)[:, None].to(device), tokens], 1)[:lanes]
        state = past(self.work, device).select(range(lanes))
        with torch.no_grad():
            logits = model(ids[:, :-1], state).logits
            forced = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return float((forced - log_probs[:lanes]).norm() / forced.norm())

    def figures(self, seconds: float) -> dict[str, float]:
        (device,) = self._built
        step = seconds / self.work.num_tokens
        rate = read_rate(device)
        return {
            "tokens_per_second": self.work.lanes / step,
            "us_per_step": step * 1e6,
            "bytes_per_step": float(self.bytes_per_step),
            "read_rate": rate,
            "read_share": self.bytes_per_step / step / rate,
        }


@contextlib.contextmanager
def arithmetic(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """No gradients, and autocast to a type of 16 bits."""
    # A cache of cast weights would be filled while recording and hold freed memory afterwards.
    cast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False)
    with torch.no_grad(), cast:
        yield


def first_ids(work: Workload) -> Tensor:
    """The token each lane reads first, `[B]`, on the CPU."""
    return torch.randint(work.vocab_size, (work.lanes,), generator=torch.Generator().manual_seed(1))


@functools.lru_cache(maxsize=1)
def _weights(config: BrainConfig, vocab_size: int, device: torch.device, dtype: torch.dtype) -> NeuroGen:
    torch.manual_seed(0)
    with device:
        model = NeuroGen(config, vocab_size=vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "decoder.weight" or name.endswith("out_proj.weight"):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)  # they begin at zero, where nothing can be checked
            if name == "decoder.weight" or name.endswith("_proj.weight"):
                parameter.data = parameter.data.to(dtype)  # as a launch packs them, so that nobody casts at each token
    return model


def make_brain(work: Workload, device: torch.device, mode: str) -> NeuroGen:
    """The workload's model in a mode; all modes share their weights, matrices in the workload's type."""
    model = copy.copy(_weights(work.brain, work.vocab_size, device, work.dtype))
    model.set_mode(mode)
    return model


@functools.lru_cache(maxsize=1)
def _read_context(
    config: BrainConfig, vocab_size: int, context: int, device: torch.device, dtype: torch.dtype
) -> BrainState:
    work = Workload("", config, GPTConfig(), vocab_size, context, 1, 1, dtype)
    model = make_brain(work, device, "fused" if device.type == "cuda" else "unfused")
    ids = torch.randint(vocab_size, (1, context), generator=torch.Generator().manual_seed(2))
    with arithmetic(device, dtype):
        return read(model, ids.to(device), model.init_state(1))


def past(work: Workload, device: torch.device) -> BrainState:
    """The state after the workload's context, the same in every lane."""
    one = _read_context(work.brain, work.vocab_size, work.context, device, work.dtype)
    return one.select([0] * work.lanes)


def brain_ways(work: Workload) -> Iterator[Way]:
    """Ours: one launch, then token by token as torch runs it, compiled, and recorded; for one lane also one launch with
    int8 weights, with filters, and a launch for each 16 tokens, as a reply is streamed."""
    element_size = torch.empty(0, dtype=work.dtype).element_size()
    shape = brain_shape(work.brain, work.vocab_size)
    num_bytes = shape.bytes_per_token(element_size=element_size, lanes=work.lanes)

    def generated(
        mode: str, weights: str | None, device: torch.device, top_k: int = 0, top_p: float = 1.0
    ) -> Callable[[], Reply]:
        model, state, ids = make_brain(work, device, mode), past(work, device), first_ids(work)[:, None]

        def run() -> Reply:
            reply = model.generate(
                ids, max_new_tokens=work.num_tokens, seed=SEED, state=state, weights=weights, top_k=top_k, top_p=top_p
            )
            return reply.tokens, reply.log_probs

        return run

    def streamed(chunk_tokens: int, device: torch.device) -> Callable[[], Reply]:
        model, state, ids = make_brain(work, device, "fused"), past(work, device), first_ids(work)[:, None]

        def run() -> Reply:
            pieces = list(
                model.generate_stream(
                    ids, max_new_tokens=work.num_tokens, chunk_tokens=chunk_tokens, seed=SEED, state=state
                )
            )
            tokens, log_probs = (torch.cat(parts, 1) for parts in zip(*((p.tokens, p.log_probs) for p in pieces)))
            return tokens.to(device), log_probs.to(device)  # pieces are the host's

        return run

    def stepped(how: type[Launched | Replayed], is_compiled: bool, device: torch.device) -> Callable[[], Reply]:
        step = brain_step(make_brain(work, device, "unfused"))
        step = compiled(step, device) if is_compiled else step
        return how(step, first_ids(work).to(device), past(work, device).tensors(), work.num_tokens)

    for provider, make in (
        ("neurogen fused, one launch", functools.partial(generated, "fused", None)),
        ("neurogen unfused", functools.partial(generated, "unfused", None)),
        ("neurogen unfused, torch.compile", functools.partial(stepped, Launched, True)),
        ("neurogen unfused, CUDA graph", functools.partial(stepped, Replayed, False)),
        ("neurogen unfused, torch.compile, CUDA graph", functools.partial(stepped, Replayed, True)),
    ):
        yield Way(provider, work, make, num_bytes, check=True)
    if work.lanes == 1:
        make = functools.partial(generated, "fused", "int8")
        rounded_bytes = shape.bytes_per_token(element_size=1)
        yield Way("neurogen fused, one launch, int8 weights", work, make, rounded_bytes, check=True, weights="int8")
        for name, make in (
            ("one launch, top_k=40", functools.partial(generated, "fused", None, top_k=40)),
            ("one launch, top_p=0.9", functools.partial(generated, "fused", None, top_p=0.9)),
            ("a launch for each 16 tokens", functools.partial(streamed, 16)),
        ):
            yield Way(f"neurogen fused, {name}", work, make, num_bytes, check=True)


def gpt_ways(work: Workload) -> Iterator[Way]:
    """A GPT with a cache of fixed size, compiled and recorded, with two kinds of attention."""
    sizes = work.gpt
    hidden = max(64, round(sizes.mlp_ratio * sizes.embedding_dim / 64) * 64)
    layer = 4 * sizes.embedding_dim**2 + 3 * sizes.embedding_dim * hidden
    element_size = torch.empty(0, dtype=work.dtype).element_size()
    weights = sizes.num_layers * layer + work.vocab_size * sizes.embedding_dim
    # Keys and values of the reply's middle token, which are those of the average one.
    cached = 2 * sizes.num_layers * sizes.embedding_dim * work.lanes * (work.context + work.num_tokens // 2)

    def make(fused: bool, device: torch.device) -> Callable[[], Reply]:
        torch.manual_seed(0)
        with device:
            model = GPT(work.gpt, vocab_size=work.vocab_size).to(work.dtype)
            capacity = work.context + max(work.num_tokens, NUM_WARMUP_STEPS + 1)
            cache = KeyValueCache.empty(model, work.lanes, capacity)
        for buffer in (*cache.keys, *cache.values):
            buffer.normal_()
        step = compiled(gpt_step(model, cache, fused=fused), device)
        state = {"position": torch.tensor(work.context, device=device)}
        return Replayed(step, first_ids(work).to(device), state, work.num_tokens)

    for provider, fused in (("SDPA", True), ("products", False)):
        yield Way(
            f"GPT, static cache, torch.compile, CUDA graph, {provider}",
            work,
            functools.partial(make, fused),
            (weights + cached) * element_size,
            check=False,  # its cache holds no text; tests compare the step with the GPT without a cache
        )
