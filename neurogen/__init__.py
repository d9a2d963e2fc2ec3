"""NeuroGen: a brain-inspired recurrent language model."""
