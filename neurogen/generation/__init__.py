"""Generation: a prompt to the tokens that follow it."""

from neurogen.generation.loop import generate
from neurogen.generation.request import Generation, Request

__all__ = ["Generation", "Request", "generate"]
