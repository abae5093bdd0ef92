"""Answer one question by each command."""
