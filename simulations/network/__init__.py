"""A network to measure on."""
