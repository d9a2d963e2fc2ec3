"""Carry: a recorded step's state at the end becomes that which the next one begins with."""

from kernels.carry.reference import carry_reference

__all__ = ["carry_reference"]
