"""Who is told what happens in a run; a file each, which `registry` finds."""
