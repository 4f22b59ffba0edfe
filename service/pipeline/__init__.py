"""The path of a query and of an enrollment through the stages, and background work."""
