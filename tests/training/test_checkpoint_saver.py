import errno
import threading
from pathlib import Path

import pytest
import torch

from neurogen.training import checkpoint
from neurogen.training.checkpoint import CheckpointNotSaved, load_checkpoint
from neurogen.training.checkpoint_saver import AsyncCheckpointSaver


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The writing thread stops at its first stage until the event is set."""
    event = threading.Event()

    def wait_at_first(stage: str) -> None:
        if stage == "begun":
            assert event.wait(timeout=20)

    monkeypatch.setattr(checkpoint, "reached", wait_at_first)
    return event


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path: Path, gate: threading.Event) -> None:
    weight, momentum, state = torch.zeros(3), torch.ones(3), torch.full((2,), 2.0)
    metadata = {"data": {"position": 1}}
    with AsyncCheckpointSaver(tmp_path) as saver:
        saver.save(
            step=1,
            model_tensors={"a": weight, "b": weight},
            optimizer_tensors={"m": momentum},
            state_tensors={"s": state},
            metadata=metadata,
        )
        assert saver.poll() is None
        for tensor in (weight, momentum, state):
            tensor += 10
        metadata["data"]["position"] = 2
        assert list(tmp_path.glob("step-*")) == []
        gate.set()
        assert saver.wait() == tmp_path / "step-00000001"
        assert saver.wait() is None
        assert saver.poll() is None
    loaded = load_checkpoint(tmp_path)
    tensors = loaded.model_tensors.load()
    assert torch.equal(tensors["a"], torch.zeros(3))
    assert tensors["a"] is tensors["b"]
    assert torch.equal(loaded.optimizer_tensors["m"], torch.ones(3))
    assert torch.equal(loaded.state_tensors["s"], torch.full((2,), 2.0))
    assert loaded.metadata == {"data": {"position": 1}}


def test_leaving_waits_for_the_last_save(tmp_path: Path, gate: threading.Event) -> None:
    threading.Timer(0.1, gate.set).start()
    with AsyncCheckpointSaver(tmp_path, keep_last=2) as saver:
        for step in range(1, 5):
            saver.save(step=step, model_tensors={"a": torch.zeros(1)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def fail_at(step_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = checkpoint._publish

    def refuse(temporary: Path, final: Path) -> None:
        if final.name == step_name:
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(temporary, final)

    monkeypatch.setattr(checkpoint, "_publish", refuse)


def test_an_error_is_raised_once_and_saving_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at("step-00000002", monkeypatch)
    with AsyncCheckpointSaver(tmp_path) as saver:
        saver.save(step=1, model_tensors={})
        saver.save(step=2, model_tensors={})
        with pytest.raises(CheckpointNotSaved, match="step 2 not saved"):
            saver.save(step=3, model_tensors={})
        assert saver.wait() == tmp_path / "step-00000003"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("way", ["wait", "close", "poll"])
def test_every_way_to_ask_tells_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    fail_at("step-00000001", monkeypatch)
    saver = AsyncCheckpointSaver(tmp_path)
    saver.save(step=1, model_tensors={})
    saver._pending.exception()  # it has ended, so that poll sees it
    with pytest.raises(CheckpointNotSaved):
        getattr(saver, way)()
    saver.close()
