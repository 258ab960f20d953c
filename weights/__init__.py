"""Weights at rest: Torch DCP, files of other projects, and what a run begins with."""
