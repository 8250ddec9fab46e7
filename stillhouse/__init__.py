"""stillhouse: distil, transfer and evaluate reinforcement-learning agents."""
