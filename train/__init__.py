"""Training jobs: the parts of the bundled world, and the mapper."""
