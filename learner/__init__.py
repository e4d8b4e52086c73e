"""The learner's wing: from accepted trajectories to published weights."""
