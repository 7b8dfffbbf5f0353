"""nanomem: memory layers (Berges et al. 2024), small enough to read in an afternoon."""
