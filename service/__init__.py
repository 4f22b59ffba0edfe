"""The HTTP service, its gallery, its client and its commands."""
