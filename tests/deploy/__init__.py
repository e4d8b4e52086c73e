"""`make test-deploy`: what `deploy/` holds, checked by the tools that operators use."""
