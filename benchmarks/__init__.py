"""Slow figures: each module is one claim of the README, run as `python -m benchmarks NAME`."""
