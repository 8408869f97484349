"""The connection to a runner: frames, one multiplexed connection, and the channel that outlives a cut."""
