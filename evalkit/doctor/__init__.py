"""``evalkit doctor``: looks the installation over."""
