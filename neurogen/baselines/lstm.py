"""A stacked LSTM (cuDNN on a GPU)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from neurogen.baselines.base import Baseline
from neurogen.baselines.config import LSTMConfig
from neurogen.brain import BrainState
from neurogen.brain.state import LayerState, LSTMState


class LSTM(Baseline):
    """Carries hidden and cell state across windows.

    Forget gates start at a bias of 1 (Jozefowicz et al. 2015), the decoder at zero as in the brain it is compared with.

    Arguments:
        config: sizes.
        vocab_size: V.
        reset_inside: whether documents start inside windows too. The sequence is then cut there, which waits for the
            device once a window; text that marks no documents needs none of it, and only a window's first token resets.
    """

    def __init__(self, config: LSTMConfig, *, vocab_size: int, reset_inside: bool = True) -> None:
        super().__init__(vocab_size=vocab_size)
        self.config = config
        self.reset_inside = reset_inside
        self.embedding = nn.Embedding(vocab_size, config.embedding_dim)
        self.lstm = nn.LSTM(config.embedding_dim, config.hidden_dim, config.num_layers, batch_first=True)
        self.decoder = nn.Linear(config.hidden_dim, vocab_size)
        nn.init.zeros_(self.decoder.weight)
        nn.init.zeros_(self.decoder.bias)
        forget = slice(config.hidden_dim, 2 * config.hidden_dim)
        with torch.no_grad():
            for layer in range(config.num_layers):
                getattr(self.lstm, f"bias_ih_l{layer}")[forget] = 1.0
                getattr(self.lstm, f"bias_hh_l{layer}")[forget] = 0.0

    def layer_states(self, lanes: int) -> dict[str, LayerState]:
        shape = (lanes, self.config.num_layers, self.config.hidden_dim)
        dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        return {"lstm": LSTMState(*(torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2)))}

    def hidden(
        self, input_ids: Tensor, state: BrainState, document_start: Tensor | None
    ) -> tuple[Tensor, dict[str, LayerState]]:
        carried = state.layers["lstm"]
        assert isinstance(carried, LSTMState)
        dtype = carried.hidden.dtype
        rows = self.embedding(input_ids)
        pieces = []
        cuts = self._cuts(document_start, input_ids.shape[1])
        for start, end in pairwise(cuts):
            if document_start is not None:
                kept = (~document_start[:, start]).to(dtype)[:, None, None]
                carried = LSTMState(*(part * kept for part in carried))
            now = rows[:, start:end]
            inside = torch.get_autocast_dtype(now.device.type) if torch.is_autocast_enabled(now.device.type) else dtype
            before = tuple(part.to(inside).transpose(0, 1).contiguous() for part in carried)
            piece, after = self.lstm(now.to(inside), before)
            carried = LSTMState(*(part.transpose(0, 1).to(dtype) for part in after))
            pieces.append(piece)
        return torch.cat(pieces, dim=1), {"lstm": carried}

    def _cuts(self, document_start: Tensor | None, num_tokens: int) -> list[int]:
        """Where the pieces that no document start divides begin, and the end."""
        if document_start is None or not self.reset_inside:
            return [0, num_tokens]
        inside = document_start[:, 1:].any(0).nonzero()[:, 0] + 1
        return [0, *inside.tolist(), num_tokens]

    def flops_per_token(self) -> int:
        """Six for each weight of a product, forward and backward."""
        matrices = [param for name, param in self.named_parameters() if param.dim() == 2 and "embedding" not in name]
        return 6 * sum(matrix.numel() for matrix in matrices)
