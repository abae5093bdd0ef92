"""Training of the bundled world's networks, on pictures by outside illustrators."""
