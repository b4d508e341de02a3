"""The steps of a run, a module each: what the driver does and what its tasks do, top to bottom."""
