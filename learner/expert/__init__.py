"""Expert rows: the store of demonstrations, the order they are drawn in, and the command that fills it."""
