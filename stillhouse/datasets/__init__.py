"""What a teacher's play left: observations, the teacher's outputs, actions, rewards and ends, in memory-mapped shards."""
