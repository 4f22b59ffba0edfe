"""Crops in, part features out: the network in its runtime, and the batches it works in."""
