"""What ``evalkit inspect`` measures of an RQAE: its codes over a corpus, its geometry, what it costs a language model."""
