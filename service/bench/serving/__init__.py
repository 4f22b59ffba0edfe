"""Parts of `cmt bench serve`: a load generator, the other servers, and the arithmetic."""
