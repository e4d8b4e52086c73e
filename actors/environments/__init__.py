"""Environments: what sets a task, answers the policy and scores it."""
