"""The audit: accounts for every lease and trajectory of a run, from what it left behind."""
