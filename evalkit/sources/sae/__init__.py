"""SAEs of every kind: their weights, their input transforms, and the source that runs them."""
