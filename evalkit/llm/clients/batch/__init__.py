"""The Batch API client: submits batches, polls them and fetches their answers."""
