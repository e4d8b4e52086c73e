"""The objective: CHORD (arXiv 2508.11408) as pure functions, tensors and numbers in, (loss, metrics) out."""
