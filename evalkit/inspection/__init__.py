"""``evalkit inspect``: measurements of one dictionary, as tables and figures."""
