"""`graft watch`: a run as it goes, from its folder alone."""
