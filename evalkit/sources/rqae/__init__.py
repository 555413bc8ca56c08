"""RQAEs as feature sources."""
