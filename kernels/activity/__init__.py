"""Activity: what is made of how often each neuron fired: shares for the eye, and a pull on its bias."""

from kernels.activity.reference import SATURATED_SHARE, activity_shares_reference, homeostatic_pull

__all__ = ["SATURATED_SHARE", "activity_shares_reference", "homeostatic_pull"]
