"""NeuroGen: embedding, brain and decoder as one model that trains and generates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurogen.brain import Brain, BrainConfig, BrainState, Decoder, TokenEmbedding
from neurogen.brain.health import health_metrics, stack_activity
from neurogen.brain.homeostasis import add_homeostasis
from neurogen.errors import UserError
from neurogen.generation import Generation, generate
from neurogen.generation.prompts import GROUP_LANES, Prompts, generate_prompts
from neurogen.generation.request import make_sampling
from neurogen.generation.stream import generate_stream
from neurogen.modes import check_dropout_runs, make_mode
from neurogen.probes import stage


@dataclass(frozen=True)
class Output:
    """What `NeuroGen.forward` gives.

    Arguments:
        logits: `[B, T, V]`, or None if targets were given.
        loss: mean cross-entropy in nats over targets other than -100, or None without targets.
        num_correct, num_targets: 0-dimensional int64 tensors on the device, or None without targets.
        state: after the last token; detach it to cut back-propagation through time.
        health: 0-dimensional tensors by name, see `health_metrics`.
    """

    logits: Tensor | None
    loss: Tensor | None
    num_correct: Tensor | None
    num_targets: Tensor | None
    state: BrainState
    health: dict[str, Tensor]


class NeuroGen(nn.Module):
    """A brain-inspired recurrent language model.

    Arguments:
        config: sizes and rules of the regions.
        vocab_size: V, at least 2.
        mode: how a sequence runs, see `neurogen.modes`; it can be changed at any time by `set_mode`.

    Raises:
        UserError: vocab_size or mode is out of range.
    """

    def __init__(self, config: BrainConfig, *, vocab_size: int, mode: str = "unfused") -> None:
        super().__init__()
        if vocab_size < 2:
            raise UserError(f"vocab_size is {vocab_size}; a model needs at least 2 tokens to choose from")
        self.config = config
        self.vocab_size = vocab_size
        std = config.embedding_dim**-0.5 if config.tie_embedding else 1.0
        self.embedding = TokenEmbedding(vocab_size, config.embedding_dim, std=std)
        self.brain = Brain(config)
        self.decoder = Decoder(config, vocab_size, self.embedding.weight if config.tie_embedding else None)
        self._optimizer: torch.optim.Optimizer | None = None
        self._max_grad_norm = 1.0
        self.set_mode(mode)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def set_mode(self, mode: str) -> None:
        """Choose how sequences run from now on; weights and states are the same in every mode."""
        self.mode = make_mode(mode)

    def init_state(self, lanes: int, *, device: torch.device | str | None = None) -> BrainState:
        """The state of `lanes` new lanes, on the model's device unless another is named."""
        if lanes < 1:
            raise UserError(f"lanes is {lanes}; a state needs at least 1")
        state = self.brain.init_state(lanes)
        return state if device is None else state.to(device)

    def forward(
        self,
        input_ids: Tensor,
        state: BrainState | None = None,
        *,
        document_start: Tensor | None = None,
        target_ids: Tensor | None = None,
    ) -> Output:
        """Run a sequence.

        Arguments:
            input_ids: `[B, T]` int64 in `[0, V)`.
            state: of B lanes, before the first token; new lanes if None.
            document_start: `[B, T]` bool, where a lane's state is reset before the token.
            target_ids: `[B, T]` int64; -100 counts for nothing. If given, there is a loss and there are no logits.

        Raises:
            UserError: shapes do not fit, or the model is in training mode with dropout and the mode trains without.
        """
        self._check_shapes(input_ids, document_start, target_ids)
        if state is None:
            state = self.init_state(input_ids.shape[0])
        elif state.lanes != input_ids.shape[0]:
            raise UserError(f"the state has {state.lanes} lanes and input_ids {input_ids.shape[0]}; make them equal")
        if self.training:
            check_dropout_runs(self.mode.name, self.config.dropout)
        out = self.mode.sequence(self.brain, self.embedding, input_ids, state, document_start)
        counts = stack_activity(out.activity) if out.activity else None
        health = health_metrics(out, counts, backend=self.mode.backend)
        if target_ids is None:
            return Output(self.decoder(out.broca_output), None, None, None, out.state, health)
        decoded = self.mode.loss(self.decoder, out.broca_output, target_ids)
        loss = decoded.loss
        if self.config.homeostasis and counts is not None and torch.is_grad_enabled():
            loss = add_homeostasis(
                loss,
                [layer.drive_bias for layer in self.brain.cortex_layers().values()],
                counts[0],
                input_ids.numel(),
                decoded.num_targets,
                strength=self.config.homeostasis,
                target=self.config.firing_rate,
                backend=self.mode.backend,
            )
        return Output(None, loss, decoded.num_correct, decoded.num_targets, out.state, health)

    def step(self, token_ids: Tensor, state: BrainState) -> tuple[Tensor, BrainState]:
        """One token a lane: ids `[B]` and a state of B lanes to logits `[B, V]` and the next state."""
        out = self.forward(token_ids[:, None], state)
        assert out.logits is not None
        return out.logits[:, 0], out.state

    def set_optimizer(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float = 1.0) -> None:
        """Choose what `train_step` updates with, and the global norm it clips gradients to."""
        self._optimizer, self._max_grad_norm = optimizer, max_grad_norm

    def train_step(self, input_ids: Tensor, target_ids: Tensor) -> tuple[float, float]:
        """One update on one batch from a new state; the trainer has its own loop for carried state and accumulation.

        Uses AdamW at learning rate 1e-3 unless `set_optimizer` chose another.

        Arguments:
            input_ids: `[B, T]` int64.
            target_ids: `[B, T]` int64, -100 to ignore.

        Returns:
            Mean cross-entropy in nats before the update, and the share of targets the arg-max hits. Reading them is the
            step's one synchronisation.
        """
        if self._optimizer is None:
            self.set_optimizer(torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0))
        assert self._optimizer is not None
        self._optimizer.zero_grad(set_to_none=True)
        out = self.forward(input_ids, target_ids=target_ids)
        assert out.loss is not None
        assert out.num_correct is not None
        assert out.num_targets is not None
        with stage("learn"):
            out.loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), self._max_grad_norm)
            self._optimizer.step()
        accuracy = out.num_correct / out.num_targets.clamp_min(1)
        loss_value, accuracy_value = torch.stack([out.loss.detach().double(), accuracy.double()]).tolist()
        return loss_value, accuracy_value

    @torch.no_grad()
    def generate(
        self,
        input_ids: Prompts,
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
        state: BrainState | None = None,
        seen: Tensor | None = None,
        weights: str | None = None,
    ) -> Generation:
        """Continue prompts: ids `[B, T]`, or B rows of ids of any lengths; see `neurogen.generation.generate` and
        `neurogen.generation.generate_prompts`. `do_sample=False` takes the most likely token. `weights="int8"` draws
        one lane's tokens from rounded matrices. The result's `log_probs` are the model's own, before penalty,
        temperature and filters."""
        temperature = temperature if do_sample else 0.0
        if isinstance(input_ids, Tensor) and len(input_ids) <= GROUP_LANES and seen is None:
            return generate(
                self,
                input_ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=stop,
                state=state,
                weights=weights,
            )
        return generate_prompts(
            self,
            input_ids,
            max_new_tokens=max_new_tokens,
            sampling=make_sampling(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
            ),
            seed=seed,
            stop=stop,
            state=state,
            seen=seen,
            weights=weights,
        )

    def generate_stream(
        self,
        input_ids: Prompts,
        *,
        max_new_tokens: int = 128,
        chunk_tokens: int = 16,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] = (),
        state: BrainState | None = None,
        weights: str | None = None,
    ) -> Iterator[Generation]:
        """Continue prompts piece by piece; see `neurogen.generation.generate_stream`."""
        sampling = make_sampling(
            temperature=temperature if do_sample else 0.0,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        return generate_stream(
            self,
            input_ids,
            max_new_tokens=max_new_tokens,
            chunk_tokens=chunk_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop,
            state=state,
            weights=weights,
        )

    def num_parameters(self) -> int:
        """Trainable numbers, a tied weight counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Model FLOPs of training on one token, forward and backward.

        Six for each weight of a matrix product (Kaplan et al. 2020), the lateral weights of the columns among
        them, plus, forward times three, 4 D N a memory layer to write and read its fast weights.
        """
        config = self.config
        matrices = sum(
            parameter.numel()
            for name, parameter in self.brain.named_parameters()
            if parameter.dim() >= 2 and not name.endswith("taps")
        )
        memory_layers = config.hippocampus_depth + config.pfc_depth
        fast_weights = 3 * 4 * config.embedding_dim * config.head_width * memory_layers
        return 6 * (matrices + self.decoder.weight.numel()) + fast_weights

    def _check_shapes(self, input_ids: Tensor, document_start: Tensor | None, target_ids: Tensor | None) -> None:
        if input_ids.dim() != 2:
            raise UserError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [lanes, tokens]")
        for name, tensor in (("document_start", document_start), ("target_ids", target_ids)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise UserError(f"{name} has shape {tuple(tensor.shape)} and input_ids {tuple(input_ids.shape)}")
