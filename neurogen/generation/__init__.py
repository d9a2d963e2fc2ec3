"""Generation: a prompt to the tokens that follow it."""

from neurogen.generation.loop import generate
from neurogen.generation.prompts import generate_prompts
from neurogen.generation.request import Generation, Request
from neurogen.generation.stream import generate_stream

__all__ = ["Generation", "Request", "generate", "generate_prompts", "generate_stream"]
