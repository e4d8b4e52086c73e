"""The foundation: what actors and the learner both speak. It imports neither wing."""
