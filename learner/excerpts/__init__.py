"""Excerpts: some groups and expert rows of the optimizer steps, token by token, for people to look at."""
