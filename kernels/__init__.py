"""Whole-sequence operations: for each, a plain torch definition and a Triton launch with the same signature."""

# The transformers library looks for another distribution of this name. It decides by version whether to import from it;
# without one, its releases around 5.0 fail on import, and a version below that distribution's 0.4 says: not that one.
__version__ = "0.1.0"
