"""The report on one experiment: results.json in; tables, figures, verdicts on the paper's claims and one page out."""
