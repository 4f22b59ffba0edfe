"""Who may do what, and how often: keys, scopes, rate limits."""
