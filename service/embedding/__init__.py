"""Crops to part features: the network in its runtime, and its micro-batches."""
