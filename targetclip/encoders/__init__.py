"""Encoders: pictures to latents, to identity features, to a second judge's embeddings."""
