"""OpenAI-compatible servers: dialects, failures, keys, rate limits, connections."""
