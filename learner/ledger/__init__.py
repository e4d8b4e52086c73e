"""The ledger: which prompt was leased to whom, what came back, and in which optimizer step it ended. It never rolls back."""
