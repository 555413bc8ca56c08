"""The first stage: where features fire, and the examples that are drawn from there."""
