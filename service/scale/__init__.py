"""A gallery in several shards, each a Ray actor with its share of the items in memory."""
