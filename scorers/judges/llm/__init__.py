"""The judge that queries a language model."""
