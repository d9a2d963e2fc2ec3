"""NeuroGen: a brain-inspired recurrent language model."""

import kernels.launch  # noqa: F401  before anything imports Triton: it decides how kernels run here
from neurogen.brain import BrainConfig, BrainState
from neurogen.errors import UserError
from neurogen.model import NeuroGen, Output

__all__ = ["BrainConfig", "BrainState", "NeuroGen", "Output", "UserError"]
