"""What a run is: its options, presets, which features, and comparisons read from one file."""
