"""AdamW: one optimiser step over many parameters."""

from kernels.adamw.reference import AdamWOptions, adamw_reference

__all__ = ["AdamWOptions", "adamw_reference"]
