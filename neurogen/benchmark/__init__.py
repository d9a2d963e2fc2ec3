"""Benchmarks: both sides timed in one process after a check, and kept as rows of a result file."""

from neurogen.benchmark.harness import Contender, Row, compare, write_rows

__all__ = ["Contender", "Row", "compare", "write_rows"]
