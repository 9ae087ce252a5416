"""A page in the browser: chat with a model, and the runs with their curves; loopback by default."""
