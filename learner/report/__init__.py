"""`chord-report`: one page to look at runs with."""
