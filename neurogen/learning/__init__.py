"""How gradients are made: back-propagation through time, or a local rule that runs with the tokens.

What is imported from here knows models and states; it knows no trainer. `docs/LEARNING.md` has the derivation.
"""

from neurogen.learning.config import BPTTConfig, LearningConfig, LocalLearningConfig
from neurogen.learning.rule import BPTT, LearningRule, WindowResult, make_learning_rule

__all__ = [
    "BPTT",
    "BPTTConfig",
    "LearningConfig",
    "LearningRule",
    "LocalLearningConfig",
    "WindowResult",
    "make_learning_rule",
]
