"""The training loop: windows in, updates out, and a look at the model now and then.

What happens at which step depends on the configuration and the step alone, so a resumed run falls in with the one it
continues.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from neurogen.brain import BrainState
from neurogen.data import Batch
from neurogen.data.prefetch import Prefetcher
from neurogen.errors import UserError
from neurogen.training.dry_run import check_memory
from neurogen.training.evaluation import evaluate_corpus
from neurogen.training.flops import model_flops_utilization, peak_memory_bytes
from neurogen.training.recorded import Pace, RecordedUpdate, can_record, choose_overlap
from neurogen.training.recorder import Recorder, SilentRecorder
from neurogen.training.replay import bundle_arguments
from neurogen.training.rng import capture_torch_rng
from neurogen.training.samples import sample_texts
from neurogen.training.schedule import learning_rate_scale, run_share
from neurogen.training.session import Session
from neurogen.training.signals import StopRequest
from neurogen.training.stopwatch import Stopwatch
from neurogen.training.update import Update, split_batch

FINISHED, INTERRUPTED = "finished", "interrupted"
# What the progress display shows of a row, and under which name.
SHOWN = {
    "train/loss": "loss",
    "val/bpb": "val_bpb",
    "throughput/tokens_per_second": "tokens/s",
    "throughput/mfu": "mfu",
}


class Trainer:
    """Trains a session until a limit or a signal, and tells a recorder.

    Arguments:
        session: model, optimiser, data and progress; changed in place.
        recorder: where metrics, samples and checkpoints go.
    """

    def __init__(self, session: Session, recorder: Recorder | SilentRecorder) -> None:
        self.session = session
        self.world = session.world
        self.recorder = recorder
        self.config = session.config.trainer
        self.update = Update(
            session.model,
            session.optimizer,
            clip_norm=self.config.clip_norm,
            precision=session.precision,
            guard=session.guard,
            world=session.world,
            spread=session.spread,
            learning=session.learning,
        )
        self._recorded = self._recorded_update()
        self._pace = Pace(session.precision.device)
        self.clock = Stopwatch(session.precision.device, seconds=session.progress.seconds)
        self._step_tokens = session.config.data.lanes * session.config.data.window
        self._interval = (session.progress.tokens, session.progress.seconds)
        self._last_score: float | None = None
        self._shown: dict[str, float] = {}
        # What the last step read: kept until the next one, for a replay bundle.
        self._parts: list[Batch] = []
        self._read: list[BrainState | None] = []
        self._rng: dict[str, torch.Tensor] = {}

    def fit(self, stop: StopRequest) -> tuple[str, str]:
        """Train to the end. Returns (`finished` or `interrupted`, why).

        `stop` is looked at between steps. However training ends, a checkpoint of its last step is being saved on
        return.
        """
        try:
            return self._fit(stop)
        finally:
            if self._recorded is not None:
                self._recorded.release()

    def _fit(self, stop: StopRequest) -> tuple[str, str]:
        ending = self._limit_reached()
        if ending is not None:  # a finished run, continued with the limits it had
            self.recorder.save(score=None)
            return ending
        self._warm_up()
        self.clock.start()
        while True:
            self._step()
            ending = self._limit_reached() or self._interrupted(stop)
            self._look(finishing=ending is not None and ending[0] == FINISHED)
            if ending is not None or self._due(self.config.checkpoint_every):
                self._settle()
                with self.clock.paused():
                    self.recorder.save(score=self._last_score)
            if ending is not None:
                return ending

    def _recorded_update(self) -> RecordedUpdate | None:
        """What takes the steps if they are recorded. Raises UserError for what is asked for and cannot be had."""
        overlap, records = self.config.overlap_update, self._records()
        if not records:
            if overlap:
                raise UserError("trainer.overlap_update=true: only a recorded step can be overlapped; leave it null")
            return None
        lanes = self.session.config.data.lanes // self.world.size // self.config.accumulation
        num_tokens = lanes * self.session.config.data.window
        return RecordedUpdate(self.update, overlap=choose_overlap(self.update, overlap, num_tokens=num_tokens))

    def _settle(self) -> None:
        """Before parameters or the optimiser's state are read: what the last step has put off is done."""
        if self._recorded is not None:
            self._recorded.settle()

    def _records(self) -> bool:
        """Whether steps are recorded as a CUDA graph. Raises UserError if they should be and cannot."""
        if self.config.cuda_graph is False:
            return False
        # The mode is each process's own where `auto` chose it; one that does not record could not follow.
        possible = self.world.all_agree(can_record(self.update))
        if self.config.cuda_graph and not possible:
            raise UserError(
                "trainer.cuda_graph=true: a step can be recorded on a GPU, with mode=fused, with "
                "learning=bptt and without trainer=fsdp; change those, or leave it null"
            )
        return possible

    def _step(self) -> None:
        """One update on the next window of every lane."""
        session, progress = self.session, self.session.progress
        share = run_share(progress, self.config, by=session.config.schedule.by, step_tokens=self._step_tokens)
        session.optimizer.set_rate_scale(learning_rate_scale(session.config.schedule, share, step=progress.step))
        self._parts = split_batch(next(session.batches), self.config.accumulation)
        self._read, self._rng = session.states, capture_torch_rng()
        if self._recorded is None:
            result = self.update(self._parts, session.states)
        else:
            result = self._recorded(self._parts, session.states)
            self._read = self._recorded.states_read
        self._pace.keep()
        if session.carries_state:
            session.states = list(result.states)
        session.meter.add(result)
        progress.step += 1
        progress.tokens += result.num_targets
        progress.seconds = self.world.from_main(self.clock.seconds)

    def _look(self, *, finishing: bool) -> None:
        """Write this step's row and samples, as far as they are due; at the end of a run everything is."""
        row = self._training_metrics() if finishing or self._due(self.config.log_every) else {}
        self._last_score = None
        with self._looking() if finishing or self._looks_closer() else contextlib.nullcontext():
            if finishing or self._due(self.config.evaluate_every):
                validation = self.validate()
                self._last_score = validation["val/loss"]
                row |= validation
            if (finishing or self._due(self.config.sample_every)) and self.world.is_main:
                self._sample()
        if row:
            self.recorder.row(row)
            self._shown |= {short: row[name] for name, short in SHOWN.items() if name in row}
            self.recorder.show(self._shown)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Around evaluation and samples: off the clock, with whole parameters."""
        self._settle()
        with self.clock.paused(), self.world.gathered(self.session.model):
            yield

    def _looks_closer(self) -> bool:
        return self._due(self.config.evaluate_every) or self._due(self.config.sample_every)

    def _due(self, every: int) -> bool:
        return every > 0 and self.session.progress.step % every == 0

    def _training_metrics(self) -> dict[str, float]:
        """Averages since the last reading; the step's one wait for the device."""
        session, progress = self.session, self.session.progress
        metrics = session.meter.read()
        self._stop_if_stuck()
        progress.seconds = self.world.from_main(self.clock.seconds)
        tokens, seconds = progress.tokens - self._interval[0], progress.seconds - self._interval[1]
        self._interval = (progress.tokens, progress.seconds)
        speed = tokens / max(seconds, 1e-9)
        metrics["train/learning_rate"] = session.optimizer.learning_rate
        metrics["throughput/tokens_per_second"] = speed
        if session.precision.name == "bfloat16":  # the peak rates known are bfloat16's
            device = session.precision.device
            utilization = model_flops_utilization(speed / self.world.size, session.model.flops_per_token(), device)
            if utilization is not None:
                metrics["throughput/mfu"] = utilization
        metrics["memory/peak_bytes"] = peak_memory_bytes(session.precision.device)
        metrics["data/epoch"] = session.batches.epoch
        if isinstance(session.batches, Prefetcher):
            metrics["data/stalls"] = session.batches.num_stalls
            metrics["data/wait_seconds"] = session.batches.wait_seconds
        return metrics

    def validate(self) -> dict[str, float]:
        """val/... with the state carried from window to window and, if wanted, val_reset/... with a new one in each.

        A mixture's sources are evaluated one by one as well, as val/<source>/...
        """
        session, data = self.session, self.session.config.data
        metrics: dict[str, float] = {}
        for prefix, carry_state in (("val", True), ("val_reset", False))[: 1 + self.config.evaluate_reset]:
            whole, sources = evaluate_corpus(
                session.model,
                session.corpus,
                lanes=data.lanes // self.config.accumulation,
                window=data.window,
                precision=session.precision,
                max_tokens=self.config.evaluate_tokens,
                carry_state=carry_state,
                world=self.world,
            )
            metrics |= whole.metrics(prefix)
            if carry_state:
                for name, source in sources.items():
                    metrics |= source.metrics(f"{prefix}/{name}")
        return metrics

    def _sample(self) -> None:
        session = self.session
        rows = sample_texts(
            session.model,
            session.corpus.tokenizer,
            self.config.sample_prompts,
            max_new_tokens=self.config.sample_tokens,
            temperature=self.config.sample_temperature,
            seed=session.config.seed,
            precision=session.precision,
            starts_documents=session.starts_documents,
        )
        self.recorder.samples(rows)

    def _limit_reached(self) -> tuple[str, str] | None:
        progress = self.session.progress
        limits = (
            ("max_steps", progress.step, self.config.max_steps),
            ("max_tokens", progress.tokens, self.config.max_tokens),
            ("max_seconds", progress.seconds, self.config.max_seconds),
        )
        for name, done, limit in limits:
            if limit is not None and done >= limit:
                return FINISHED, f"trainer.{name}={limit} reached"
        return None

    def _interrupted(self, stop: StopRequest) -> tuple[str, str] | None:
        if self.world.highest(int(stop.requested)):
            return INTERRUPTED, f"{stop.name or 'a signal to another process'} received"
        if self.config.stop_at_step is not None and self.session.progress.step >= self.config.stop_at_step:
            return INTERRUPTED, f"trainer.stop_at_step={self.config.stop_at_step} reached"
        return None

    def _stop_if_stuck(self) -> None:
        """Raise UserError if too many steps in a row were skipped, after leaving the last one for scripts/replay.py."""
        limit, skipped = self.config.max_skipped_in_a_row, self.session.guard.num_in_a_row()
        if not limit or skipped < limit:
            return
        self._settle()
        reason = f"{skipped} steps in a row were skipped up to step {self.session.progress.step}"
        bundle = self.recorder.bundle(bundle_arguments(self.session, self._parts, self._read, self._rng, reason=reason))
        raise UserError(
            f"trainer.max_skipped_in_a_row={limit}: {reason}, their losses or gradients not finite or outlying; see "
            f"what came first: python scripts/replay.py bundle={bundle}"
        )

    def _warm_up(self) -> None:
        """On a GPU, take the first step without its update and off the clock: kernels compile, and too large a batch
        shows at once. A resumed run does so as well, hence what dropout draws in it is drawn again."""
        session, on_gpu = self.session, self.session.precision.device.type == "cuda"
        if not (on_gpu if self.config.dry_run is None else self.config.dry_run):
            return
        position = session.batches.state_dict()
        batch = next(session.batches)
        session.batches.load_state_dict(position)

        def attempt(num_parts: int) -> None:
            try:
                self.update.backward(split_batch(batch, num_parts), session.divided_states(num_parts))
                moments = session.optimizer.unborn_state()
                if on_gpu:
                    torch.cuda.synchronize(session.precision.device)
                del moments
            finally:
                session.optimizer.zero_grad()

        with torch.random.fork_rng(devices=[session.precision.device] if on_gpu else []):
            check_memory(
                attempt,
                lanes=session.config.data.lanes // self.world.size,
                accumulation=self.config.accumulation,
                window=session.config.data.window,
                search=self.world.size == 1,  # the others could not follow
            )
