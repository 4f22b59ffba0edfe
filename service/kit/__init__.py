"""Small tools that depend on nothing else in the service."""
