"""The configuration of a run: options, presets, the choice of features, and sweeps read from a TOML file."""
