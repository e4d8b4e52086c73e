"""What travels between processes: typed messages, their frames, the sockets, and groups of trajectories as arrays."""
