"""Other language models of equal size, for comparison under the same trainer, data and optimiser."""

from neurogen.baselines.base import Baseline
from neurogen.baselines.config import GPTConfig, LSTMConfig
from neurogen.baselines.gpt import GPT
from neurogen.baselines.gpt_decoding import KeyValueCache, decode_step
from neurogen.baselines.lstm import LSTM

__all__ = ["GPT", "LSTM", "Baseline", "GPTConfig", "KeyValueCache", "LSTMConfig", "decode_step"]
