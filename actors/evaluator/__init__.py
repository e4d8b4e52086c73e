"""The evaluator: an actor pinned to one version at a time, scoring held-out problems."""
