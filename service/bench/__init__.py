"""Benchmarks of the service: `cmt bench rescore`, `recall` and `embed`."""
