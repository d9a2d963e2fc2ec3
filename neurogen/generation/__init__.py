"""Generation: a prompt to the tokens that follow it."""

from neurogen.generation.loop import Generation, generate

__all__ = ["Generation", "generate"]
