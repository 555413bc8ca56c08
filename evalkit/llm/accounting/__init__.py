"""What was answered and what it cost: the recording, prices, limits."""
