"""Numbers: scores per feature, standard errors, where scores vary."""
