"""Tables and plots of a run, made from its records alone: no torch, no language model, no client is imported."""
