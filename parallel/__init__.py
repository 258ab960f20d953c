"""Ranks, meshes, collectives, sharding."""
