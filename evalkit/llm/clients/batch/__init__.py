"""The Batch API: what was submitted, how far it is, and fetching its answers."""
