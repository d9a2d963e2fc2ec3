"""Sizes of the models we compare with."""

from dataclasses import dataclass

from neurogen.brain.dropout import check_dropout
from neurogen.errors import UserError


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT.

    Arguments:
        embedding_dim: D.
        num_layers: at least 1.
        head_width: divides D; even, since rotary positions turn pairs of channels.
        mlp_ratio: hidden width of SwiGLU over D, rounded to a multiple of 64.
        norm_eps: added to mean squares.
        dropout: share left out, in training alone, of the embedding, of attention's weights and of what each attention
            and each SwiGLU adds, in [0, 1), as nanoGPT has it.
        compile: whether torch.compile runs it on a GPU; on a CPU it never does.
    """

    embedding_dim: int = 512
    num_layers: int = 6
    head_width: int = 64
    mlp_ratio: float = 8 / 3
    norm_eps: float = 1e-6
    dropout: float = 0.0
    compile: bool = True
    name: str = "gpt"

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"model.num_layers is {self.num_layers}; a GPT needs at least 1")
        if self.head_width < 2 or self.head_width % 2 or self.embedding_dim % self.head_width:
            raise UserError(
                f"model.head_width is {self.head_width}; it must be even and divide model.embedding_dim = "
                f"{self.embedding_dim}"
            )
        check_dropout(self.dropout)


@dataclass(frozen=True)
class LSTMConfig:
    """Sizes of a stacked LSTM.

    Arguments:
        embedding_dim: D, width of an embedding row.
        hidden_dim: width of every layer.
        num_layers: at least 1.
    """

    embedding_dim: int = 512
    hidden_dim: int = 1152
    num_layers: int = 2
    name: str = "lstm"

    def __post_init__(self) -> None:
        for key in ("embedding_dim", "hidden_dim", "num_layers"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key} is {getattr(self, key)}; it must be at least 1")
