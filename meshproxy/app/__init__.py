"""The composition root: the one place that reads files, environment and clock, and puts the rooms together."""
