"""CURVE keys: the files they lie in, who may come in with one, and `chord-keys`."""
