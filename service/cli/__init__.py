"""The commands of `cmt` that serve, and that talk to a running service."""
