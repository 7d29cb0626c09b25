"""The composition root: the only place that reads files, environment and clock, and connects the other packages."""
