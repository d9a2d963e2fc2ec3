"""The brain: regions, their state, and the cognitive step that runs a sequence through them."""

from neurogen.brain.brain import Brain, BrainOutput
from neurogen.brain.config import BrainConfig
from neurogen.brain.decoder import Decoder
from neurogen.brain.embedding import TokenEmbedding
from neurogen.brain.health import health_metrics
from neurogen.brain.state import BrainState, MemoryState

__all__ = [
    "Brain",
    "BrainConfig",
    "BrainOutput",
    "BrainState",
    "Decoder",
    "MemoryState",
    "TokenEmbedding",
    "health_metrics",
]
