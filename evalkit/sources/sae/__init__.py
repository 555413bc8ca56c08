"""SAEs and transcoders: their weights, their input transforms, and the feature source that runs them."""
