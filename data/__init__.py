"""Pairs of (target embedding, direction), and the pictures they are made from."""
