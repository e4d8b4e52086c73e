"""`chord-local`: a whole run on one machine, as processes that are started, watched, shown and ended together."""
