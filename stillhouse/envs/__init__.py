"""Environments: any Gymnasium id, MinAtar, physics and appearance variants, one vector wrapper."""
