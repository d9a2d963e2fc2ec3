"""Other language models of equal size, for comparison under the same data and optimiser."""

from neurogen.baselines.gpt import GPT, GPTConfig
from neurogen.baselines.gpt_decoding import KeyValueCache, decode_step
from neurogen.baselines.lstm import LSTM

__all__ = ["GPT", "LSTM", "GPTConfig", "KeyValueCache", "decode_step"]
