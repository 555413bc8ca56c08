"""How well a dictionary reconstructs its site, and whether it may be scored there."""
