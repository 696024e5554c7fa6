"""The prediction store: what a teacher predicted at every timestep, committed shard by shard."""
