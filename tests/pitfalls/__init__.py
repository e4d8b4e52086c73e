"""Pitfalls planted on purpose: the maths tests must fail for each of them (`make pitfalls`)."""
