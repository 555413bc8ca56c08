"""Training of dictionaries for one site: an activation store, an SAE trainer, and cards with held-out measurements."""
