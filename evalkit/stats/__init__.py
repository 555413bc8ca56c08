"""Statistics of judgements: scores per feature, standard errors, and the sources of variance."""
