"""The actors' wing: engines that sample, environments that score, and the workers that stream trajectories."""
