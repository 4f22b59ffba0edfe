"""Back up a gallery to one file while it is written to, and restore it; either database."""
