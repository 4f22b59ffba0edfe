"""What `cmt bench serve` is made of: a load generator, the other servers, and its arithmetic."""
