"""What a sequence costs: time by stage, memory allocated, copies, synchronisations, launches, use of CPU and GPU."""
