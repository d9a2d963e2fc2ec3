"""The canary passes right kernels, names wrong ones, and remembers."""

import pytest
import torch

from neurogen.brain import BrainConfig
from neurogen.modes import canary_probes as probes
from neurogen.modes.canary import CanaryError, check_kernels, compare

CONFIG = BrainConfig(embedding_dim=32, column_width=16, head_width=16, chunk_size=16)
OPS = ["relay", "cortex", "memory", "gated_norm", "decode"]


@pytest.fixture
def definitions_only(monkeypatch):
    """No op runs a kernel, which takes seconds each in the interpreter: for tests of what is done with the outcome."""
    for op in OPS:
        right = getattr(probes, op)
        monkeypatch.setattr(probes, op, lambda *args, right=right, backend, **kwargs: right(*args, **kwargs))


@pytest.mark.parametrize(("spike", "rule"), [("graded", "hebbian"), ("binary", "delta")])
def test_passes_the_kernels_as_they_are(rule, spike, tmp_path):
    config = BrainConfig(32, 16, 16, spike=spike, memory_rule=rule, chunk_size=16)
    assert check_kernels(config, "cpu", torch.float32, cache_dir=tmp_path)


def test_passes_a_smooth_units_kernel():
    config = BrainConfig(32, 16, 16, spike="smooth", homeostasis=0.0)
    (probe,) = [probe for probe in probes.make_probes(config) if probe.op == "cortex"]
    assert max(compare(probe, torch.device("cpu"), torch.float32).values()) < 1e-5


def test_probes_keep_neurons_away_from_the_threshold():
    # Otherwise a correct bfloat16 kernel could flip a binary spike and fail.
    config = BrainConfig(64, 32, 32, spike="binary")
    (probe,) = [probe for probe in probes.make_probes(config) if probe.op == "cortex"]
    exact = probe.run({name: x.double() for name, x in (probe.stored | probe.full).items()}, "reference")["spikes"]
    for seed in range(5):
        noise = torch.Generator().manual_seed(seed)
        inputs = {
            name: (x + 0.005 * torch.randn(x.shape, generator=noise)).double()
            for name, x in (probe.stored | probe.full).items()
        }
        inputs["decay"] = probe.full["decay"].double()
        assert torch.equal(probe.run(inputs, "reference")["spikes"], exact)


@pytest.mark.parametrize("op", OPS)
def test_names_an_op_that_is_wrong(op, definitions_only, monkeypatch):
    right = getattr(probes, op)

    def wrong(*args, backend, **kwargs):
        out = right(*args, backend=backend, **kwargs)
        if backend == "reference":
            return out
        if isinstance(out, torch.Tensor):
            return out * 1.01
        # A NamedTuple or a tuple whose first member is the output.
        return type(out)(out[0] * 1.01, *out[1:]) if hasattr(out, "_fields") else (out[0] * 1.01, *out[1:])

    monkeypatch.setattr(probes, op, wrong)
    with pytest.raises(CanaryError, match=f"fused {op} is wrong on this device: relative error of its .* is 1.0e-02"):
        check_kernels(CONFIG, "cpu", torch.float32)


def test_names_a_gradient_that_is_wrong(monkeypatch):
    class Crooked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.001 * grad

    right = probes.memory

    def wrong(query, *args, backend, **kwargs):
        return right(query if backend == "reference" else Crooked.apply(query), *args, backend="reference", **kwargs)

    monkeypatch.setattr(probes, "memory", wrong)
    (probe,) = [probe for probe in probes.make_probes(CONFIG) if probe.op == "memory"]
    with pytest.raises(CanaryError, match=r"gradient of query is .*, the limit in float32 is 1e-04"):
        compare(probe, torch.device("cpu"), torch.float32)


def test_a_nan_fails(monkeypatch):
    right = probes.gated_norm
    monkeypatch.setattr(
        probes,
        "gated_norm",
        lambda *args, backend, **kwargs: right(*args, **kwargs) * (float("nan") if backend == "fused" else 1.0),
    )
    with pytest.raises(CanaryError, match="fused gated_norm"):
        check_kernels(CONFIG, "cpu", torch.float32)


def test_remembers_a_pass_by_what_it_depends_on(definitions_only, tmp_path, monkeypatch):
    assert check_kernels(CONFIG, "cpu", torch.float32, cache_dir=tmp_path)
    assert not check_kernels(CONFIG, "cpu", torch.float32, cache_dir=tmp_path)
    assert check_kernels(BrainConfig(64, 16, 16, chunk_size=16), "cpu", torch.float32, cache_dir=tmp_path)
    monkeypatch.setattr("neurogen.modes.canary.triton.__version__", "0")
    assert check_kernels(CONFIG, "cpu", torch.float32, cache_dir=tmp_path)


def test_does_not_remember_a_failure(definitions_only, tmp_path, monkeypatch):
    right = probes.decode
    monkeypatch.setattr(
        probes,
        "decode",
        lambda hidden, *a, backend, **k: right(hidden * (1.1 if backend == "fused" else 1.0), *a, backend=backend, **k),
    )
    for _ in range(2):
        with pytest.raises(CanaryError, match="fused decode"):
            check_kernels(CONFIG, "cpu", torch.float32, cache_dir=tmp_path)
