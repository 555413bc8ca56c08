"""Training of SAEs and RQAEs for one site: hidden states, the SAE trainer, and cards with held-out measurements."""
