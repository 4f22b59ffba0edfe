"""Benchmarks of the service: `cmt bench --help` lists them."""
