"""The configuration: typed, composed from conf/ by Hydra, checked in one place."""
