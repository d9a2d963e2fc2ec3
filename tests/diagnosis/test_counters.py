"""The instruments count what is there, and the modes cost what their names promise."""

import time
from collections.abc import Callable

import pytest
import torch

from neurogen import NeuroGen
from neurogen.diagnosis.clock import OTHER, StageClock
from neurogen.diagnosis.counters import OperationCounter, count, count_host_allocations, count_runtime_calls
from neurogen.diagnosis.usage import UsageMeter, mean_report
from neurogen.modes.naive import host_round_trip
from neurogen.probes import STAGES, stage
from neurogen.training.recorded import STEPS_AHEAD, Pace

CPU = torch.device("cpu")
NUM_TOKENS = 5
WIDTH, LANES = 24, 2


def trainer(model: NeuroGen) -> Callable[[], object]:
    """A training step whose optimiser reads nothing on the host."""
    model.set_optimizer(torch.optim.AdamW(model.parameters(), fused=True))
    ids = torch.randint(11, (LANES, NUM_TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    return lambda: model.train_step(ids, ids)


def generator(model: NeuroGen, num_tokens: int = NUM_TOKENS) -> Callable[[], object]:
    prompt = torch.zeros(LANES, 1, dtype=torch.int64)
    return lambda: model.generate(prompt, max_new_tokens=num_tokens, stop=(4,), seed=2).replies()


def counted(work: Callable[[], object]) -> OperationCounter:
    work()
    with OperationCounter() as counter:
        work()
    return counter


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: bool(x[0] > 0), 1),
        (lambda x: float(x[0]) + int(x[1]), 2),
        (lambda x: x.cpu(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: (x * 2).sum(), 0),
        (lambda x: x[0:2].clone(), 0),
    ],
)
def test_synchronisations_are_counted(work: Callable[[torch.Tensor], object], expected: int) -> None:
    assert counted(lambda: work(torch.arange(4.0))).synchronisations == expected


def test_copies_are_counted_in_both_directions_of_both_passes() -> None:
    x = torch.randn(3, 5, requires_grad=True)

    def work() -> None:
        y = host_round_trip(x)
        assert y.data_ptr() != x.data_ptr()
        (y * 2).sum().backward()

    counter = counted(work)
    assert counter.copies == {"host_to_device": 2, "device_to_host": 2}
    assert counter.copied_bytes == {"host_to_device": 120, "device_to_host": 120}
    assert torch.equal(x.grad, torch.full((3, 5), 4.0))  # two runs, 2 each


def test_host_allocations_are_counted_with_what_operations_hide() -> None:
    assert count_host_allocations(lambda: torch.empty(1000)) == (1, 4000)
    x = torch.ones(7, 7)
    buffer = torch.empty(7, 7)
    assert count_host_allocations(lambda: torch.mul(x, x, out=buffer)) == (0, 0)
    num, _ = count_host_allocations(lambda: buffer.add_(1.5))  # the number becomes a tensor
    assert num >= 1


def test_naive_copies_vectors_and_waits_once_a_token(make_model: Callable[..., NeuroGen]) -> None:
    vector = LANES * WIDTH * 8
    counter = counted(trainer(make_model(mode="naive")))
    assert counter.synchronisations == NUM_TOKENS + 1  # and the step's own
    # The row and Broca's output, there and back, and so their gradients; one count of hits goes up at the end.
    assert counter.copies["device_to_host"] == 4 * NUM_TOKENS
    assert counter.copied_bytes["device_to_host"] == 4 * NUM_TOKENS * vector
    assert counter.copied_bytes["host_to_device"] == 4 * NUM_TOKENS * vector + 8

    counter = counted(generator(make_model(mode="naive")))
    assert counter.synchronisations == NUM_TOKENS + 1  # and reading the replies
    assert counter.copies["device_to_host"] == 2 * NUM_TOKENS
    assert counter.copied_bytes["host_to_device"] == NUM_TOKENS * (2 * vector + LANES * 8)


def test_pointer_copies_no_vectors(make_model: Callable[..., NeuroGen]) -> None:
    training = counted(trainer(make_model(mode="pointer")))
    assert training.synchronisations == 1
    generating = counted(generator(make_model(mode="pointer")))
    assert generating.synchronisations == NUM_TOKENS + 1
    for counter in (training, generating):
        assert counter.copies == {"host_to_device": 0, "device_to_host": 0}


@pytest.mark.parametrize("mode", ["preallocated", "unfused"])
def test_one_synchronisation_a_sequence(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    for work in (trainer, generator):
        counter = counted(work(make_model(mode=mode)))
        assert counter.synchronisations == 1
        assert counter.copies == {"host_to_device": 0, "device_to_host": 0}


def test_count_gathers_every_instrument(make_model: Callable[..., NeuroGen]) -> None:
    counts = count(generator(make_model(mode="naive"), 2), CPU)
    assert counts.synchronisations == 3
    assert counts.host_allocations > 100
    assert counts.host_bytes > counts.host_allocations
    assert counts.churned_bytes == counts.host_bytes
    assert counts.python_peak_bytes > 0
    assert counts.kernel_launches is None


def test_stages_add_up_and_nested_ones_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("neurogen.diagnosis.clock.time.perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    with StageClock(CPU) as clock:
        spend(1.0)
        with stage("cognitive_step"):
            spend(2.0)
            with stage("decode"):
                spend(4.0)
            spend(8.0)
        spend(16.0)
        with stage("decode"):
            spend(32.0)
    expected = dict.fromkeys(STAGES, 0.0) | {OTHER: 17.0, "cognitive_step": 10.0, "decode": 36.0}
    assert clock.seconds == expected
    assert clock.total == 63.0


def test_nobody_listens_after_the_clock_has_stopped() -> None:
    with StageClock(CPU) as clock:
        pass
    before = dict(clock.seconds)
    with stage("decode"):
        time.sleep(0.001)
    assert clock.seconds == before


@pytest.mark.parametrize("mode", ["naive", "pointer", "preallocated", "unfused"])
def test_every_stage_of_a_mode_takes_time(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(mode=mode)
    with StageClock(CPU) as clock:
        trainer(model)()
        generator(model)()
    assert all(clock.seconds[name] > 0 for name in STAGES)
    assert clock.seconds[OTHER] < 0.5 * clock.total


def test_use_of_the_cpu() -> None:
    with UsageMeter(CPU) as idle:
        time.sleep(0.1)
    with UsageMeter(CPU) as busy:
        start = time.process_time()
        while time.process_time() - start < 0.1:
            pass
    assert idle.seconds >= 0.1
    assert idle.cpu_percent < 30
    assert busy.cpu_percent > idle.cpu_percent
    assert busy.gpu_percent is None
    assert busy.gpu_memory_bytes is None


def test_reports_of_the_time_before_do_not_count() -> None:
    assert mean_report([(0.5, 0), (0.9, 10), (1.1, 80), (1.6, 90)]) == 85
    assert mean_report([(0.5, 20), (0.9, 40)]) == 30
    assert mean_report([]) is None


@pytest.mark.gpu
def test_the_host_sleeps_while_it_waits_for_a_step() -> None:
    pace = Pace(torch.device("cuda"))
    pace.keep()
    with UsageMeter(torch.device("cpu")) as meter:
        for _ in range(STEPS_AHEAD + 2):
            torch.cuda._sleep(400_000_000)  # cycles: some 0.2 s
            pace.keep()
    torch.cuda.synchronize()
    assert meter.seconds > 0.2
    assert meter.cpu_percent < 40


@pytest.mark.gpu
def test_nothing_waits_inside_a_sequence_on_gpu(make_model: Callable[..., NeuroGen]) -> None:
    """The driver is told to refuse any wait; unfused and preallocated still train and generate."""
    ids = torch.zeros(LANES, NUM_TOKENS, dtype=torch.int64, device="cuda")
    for mode in ("unfused", "preallocated"):
        model = make_model(dtype=torch.float32, mode=mode).to("cuda")
        for _ in range(2):
            try:
                torch.cuda.set_sync_debug_mode("error" if _ else "default")
                model(ids, target_ids=ids).loss.backward()
                out = model.generate(torch.zeros(LANES, 1, dtype=torch.int64), max_new_tokens=3, stop=(4,))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert len(out.replies()) == LANES


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["naive", "pointer", "preallocated", "unfused"])
def test_counts_on_gpu(mode: str, make_model: Callable[..., NeuroGen]) -> None:
    model = make_model(dtype=torch.float32, mode=mode).to("cuda")
    counter = counted(trainer(model))
    vector = LANES * WIDTH * 4
    if mode == "naive":
        assert counter.copies["device_to_host"] >= 4 * NUM_TOKENS
        assert counter.copied_bytes["device_to_host"] >= 4 * NUM_TOKENS * vector
        assert counter.synchronisations == NUM_TOKENS + 1
    else:
        assert counter.copied_bytes["device_to_host"] < vector
        assert counter.synchronisations == 1
    launches, _ = count_runtime_calls(trainer(model))
    assert launches > 50
    counts = count(trainer(model), torch.device("cuda"))
    assert counts.device_allocations > 0
    assert counts.device_bytes > counts.device_allocations
