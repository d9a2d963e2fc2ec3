"""Whole-sequence operations: for each, a plain torch definition and a Triton launch with the same signature."""
