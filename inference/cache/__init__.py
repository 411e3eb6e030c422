"""The paged latent cache in memory."""
