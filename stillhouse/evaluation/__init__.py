"""Evaluation: rollouts on seeds of their own, honest statistics, and recorded play."""
