"""The three engines and the choice between them."""
