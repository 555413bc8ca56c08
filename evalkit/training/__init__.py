"""Training the dictionaries of one site: an activation store, an SAE trainer, cards that say what was measured."""
