"""Metrics that Prometheus asks for: of the trunk, of the run, of the process."""
