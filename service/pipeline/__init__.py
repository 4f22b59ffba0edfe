"""The way of a query and of an enrollment through the stages."""
