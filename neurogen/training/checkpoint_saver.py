"""Saving beside training: the step waits for a copy to the host only, a thread writes, hashes and syncs."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from neurogen.storage.files import encode_floats
from neurogen.storage.tensor_file import snapshot
from neurogen.training.checkpoint import SavesItself, save_checkpoint


class AsyncCheckpointSaver:
    """Write checkpoints in one background thread, one at a time. Costs one more copy of the tensors in host memory.

    An error of a save is raised by the next `poll`, `save` or `wait`, exactly once. Leaving the context waits for the
    save under way, so that the last checkpoint of a run is on disk before its process ends.
    """

    def __init__(self, directory: Path, *, keep_last: int | None = 3, keep_best: bool = True) -> None:
        self._directory = directory
        self._retention: dict[str, Any] = {"keep_last": keep_last, "keep_best": keep_best}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(
        self,
        *,
        step: int,
        model_tensors: Mapping[str, Tensor],
        optimizer_tensors: Mapping[str, Tensor] | None = None,
        optimizer_scalars: Any = None,
        state_tensors: Mapping[str, Tensor] | None = None,
        metadata: dict[str, Any] | None = None,
        tokenizer: SavesItself | None = None,
        score: float | None = None,
    ) -> None:
        """Copy everything now and write it in the background; the arguments are those of `save_checkpoint`.

        Waits while the save before is still being written. If that one failed, the new one is started all the same, and
        then the error (which names its step) is raised.
        """
        previous, self._pending = self._pending, None
        error = previous.exception() if previous is not None else None
        self._pending = self._pool.submit(
            save_checkpoint,
            self._directory,
            step=step,
            model_tensors=snapshot(model_tensors),
            optimizer_tensors=snapshot(optimizer_tensors or {}),
            optimizer_scalars=encode_floats(optimizer_scalars),
            state_tensors=snapshot(state_tensors or {}),
            metadata=encode_floats(metadata or {}),
            tokenizer=tokenizer,
            score=score,
            **self._retention,
        )
        if error is not None:
            raise error

    def poll(self) -> Path | None:
        """Return the folder of a save that has ended since the last call, else None. Never waits. Raises its error."""
        if self._pending is None or not self._pending.done():
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Wait for the save under way and return its folder; None when there is none. Raises its error."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Wait for the save under way and end the thread. Raises its error."""
        try:
            self.wait()
        finally:
            self._pool.shutdown(wait=True)

    def __enter__(self) -> "AsyncCheckpointSaver":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
