"""Verdict: the norm of all gradients, whether a step is taken, and what its gradients are scaled by."""

from kernels.verdict.reference import LEAST_FACTOR, NUM_REMEMBERED, History, outlier_limits, verdict_reference

__all__ = ["LEAST_FACTOR", "NUM_REMEMBERED", "History", "outlier_limits", "verdict_reference"]
