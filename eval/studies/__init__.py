"""Studies: one question each, answered by one command."""
