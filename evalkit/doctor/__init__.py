"""``evalkit doctor``: checks the installation."""
