"""Measurements, as ratios to named rivals; each file is run with python -m benchmarks.<name>."""
