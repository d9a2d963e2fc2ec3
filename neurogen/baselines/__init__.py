"""Other language models of equal size, for comparison under the same data and optimiser."""

from neurogen.baselines.gpt import GPT, GPTConfig
from neurogen.baselines.lstm import LSTM

__all__ = ["GPT", "LSTM", "GPTConfig"]
