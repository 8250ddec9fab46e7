"""What a teacher's play left: observations, outputs, actions, rewards and ends, in memory-mapped shards."""
