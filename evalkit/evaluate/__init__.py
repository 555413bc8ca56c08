"""The second and third stage: explaining features and scoring explanations."""
