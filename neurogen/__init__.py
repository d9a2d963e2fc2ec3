"""NeuroGen: a brain-inspired recurrent language model."""

from neurogen.brain import BrainConfig, BrainState
from neurogen.errors import UserError
from neurogen.model import NeuroGen, Output

__all__ = ["BrainConfig", "BrainState", "NeuroGen", "Output", "UserError"]
