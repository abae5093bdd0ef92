"""Networks that read pictures: latents, identity features, a second judge's embeddings."""
