"""What the trainer, evaluation and generation ask of any model, around one that gives logits."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.decode import IGNORE_INDEX, DecodeOutput
from kernels.relay import NO_TOKEN
from kernels.sample import sample_logits
from neurogen.brain import BrainState
from neurogen.brain.config import NUM_TAPS
from neurogen.brain.dropout import evaluating
from neurogen.brain.state import LayerState
from neurogen.errors import UserError
from neurogen.generation import Generation
from neurogen.generation.loop import freeze_lanes
from neurogen.generation.request import Request, check_prompt, check_stop, make_sampling
from neurogen.model import Output


class Baseline(nn.Module):
    """A language model with the interface of `NeuroGen`; a subclass gives `hidden` and a `decoder`.

    Its state is a `BrainState`, whose `position` counts tokens and whose layers hold what the model carries, if
    anything.
    """

    decoder: nn.Linear
    embedding: nn.Embedding
    # It has one way to run, which reports name as they would a mode.
    mode = SimpleNamespace(name="torch")

    def __init__(self, *, vocab_size: int) -> None:
        super().__init__()
        if vocab_size < 2:
            raise UserError(f"vocab_size is {vocab_size}; a model needs at least 2 tokens to choose from")
        self.vocab_size = vocab_size

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def hidden(
        self, input_ids: Tensor, state: BrainState, document_start: Tensor | None
    ) -> tuple[Tensor, dict[str, LayerState]]:
        """Ids `[B, T]` to what the decoder reads, `[B, T, D]`, and what each layer carries on."""
        raise NotImplementedError

    def layer_states(self, lanes: int) -> dict[str, LayerState]:
        """What new lanes carry, by layer; nothing unless a subclass says otherwise."""
        return {}

    def init_state(self, lanes: int) -> BrainState:
        """The state of new lanes."""
        recent_ids = torch.full((lanes, NUM_TAPS - 1), NO_TOKEN, dtype=torch.int64, device=self.device)
        position = torch.zeros(lanes, dtype=torch.int64, device=self.device)
        return BrainState(position, recent_ids, self.layer_states(lanes))

    def forward(
        self,
        input_ids: Tensor,
        state: BrainState | None = None,
        *,
        document_start: Tensor | None = None,
        target_ids: Tensor | None = None,
    ) -> Output:
        """Run a sequence; see `NeuroGen.forward`. There are no health metrics."""
        if state is None:
            state = self.init_state(input_ids.shape[0])
        position = state.position + input_ids.shape[1]
        if target_ids is None:
            hidden, layers = self.hidden(input_ids, state, document_start)
            after = BrainState(position, state.recent_ids, layers)
            return Output(self.decoder(hidden), None, None, None, after, {})
        decoded, layers = self.measure(input_ids, state, document_start, target_ids)
        return Output(None, *decoded, BrainState(position, state.recent_ids, layers), {})

    def measure(
        self, input_ids: Tensor, state: BrainState, document_start: Tensor | None, target_ids: Tensor
    ) -> tuple[DecodeOutput, dict[str, LayerState]]:
        """Loss and counts of a window, and what each layer carries on."""
        hidden, layers = self.hidden(input_ids, state, document_start)
        return self.decode(hidden, target_ids), layers

    def decode(self, hidden: Tensor, target_ids: Tensor) -> DecodeOutput:
        """Loss and counts of `[B, T, D]` against targets `[B, T]`."""
        logits, targets = self.decoder(hidden).flatten(0, 1), target_ids.flatten()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        counted = targets != IGNORE_INDEX
        total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        num_targets = counted.sum()
        num_correct = ((logits.detach().argmax(-1) == targets) & counted).sum()
        return DecodeOutput(total / num_targets.clamp_min(1), num_correct, num_targets)

    def flops_per_token(self) -> int:
        """Model FLOPs of training on one token, forward and backward."""
        raise NotImplementedError

    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] = (),
        weights: str | None = None,
    ) -> Generation:
        """Continue prompts `[B, T]`, T >= 1; arguments and draws are those of `NeuroGen.generate`.

        Raises:
            UserError: a prompt, an id or a sampling setting is out of range, or there are `weights`, which are for a
                brain.
        """
        if weights is not None:
            raise UserError(f"weights={weights}: only a brain's matrices are rounded; leave it out here")
        check_prompt(input_ids, self.vocab_size, max_new_tokens)
        sampling = make_sampling(
            temperature=temperature if do_sample else 0.0,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        ids = input_ids.to(self.device, torch.int64)
        stop_ids = check_stop(stop, self.vocab_size)
        request = Request(ids, max_new_tokens, sampling, seed, stop_ids, self.init_state(ids.shape[0]))
        with evaluating(self):
            return self._continue(request)

    def _continue(self, request: Request) -> Generation:
        state, text = request.state, request.input_ids
        lanes, seen = request.lane_numbers(), request.seen_tokens(self.vocab_size)
        done = torch.zeros_like(lanes, dtype=torch.bool)
        last, lengths = torch.zeros_like(lanes), torch.zeros_like(lanes)
        stop = torch.tensor(request.stop, dtype=torch.int64, device=self.device)
        tokens, log_probs = [], []
        for n in range(request.max_new_tokens):
            out = self.next_logits(text, state, num_new=text.shape[1] if n == 0 else 1)
            state = freeze_lanes(done, state, out.state) if n else out.state
            assert out.logits is not None
            drawn = sample_logits(
                out.logits[:, -1], request.sampling, seed=request.seed, lanes=lanes, positions=state.position, seen=seen
            )
            last = torch.where(done, last, drawn.tokens)
            tokens.append(last)
            log_probs.append(drawn.log_probs.masked_fill(done, 0.0))
            lengths += ~done
            if seen is not None:
                seen.scatter_(1, last[:, None], True)
            done = done | torch.isin(last, stop)
            text = torch.cat([text, last[:, None]], dim=1)
        return Generation(torch.stack(tokens, 1), torch.stack(log_probs, 1), lengths, state)

    def next_logits(self, text: Tensor, state: BrainState, *, num_new: int) -> Output:
        """Logits after `text` `[B, T]`, of which the state has not read the last `num_new`."""
        return self(text[:, -num_new:], state)
