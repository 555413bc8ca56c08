"""The first stage: finds where features fire and draws examples from there."""
