"""A client in a process of its own, so that answers outlive the command that asked for them."""
