"""The weight plane: snapshots as files, served in chunks by credit, fetched and verified by any number of peers."""
