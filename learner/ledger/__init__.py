"""The ledger: which prompt was leased to whom, what came back, in which step it was trained. It never rolls back."""
