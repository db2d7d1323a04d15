"""The report on one experiment: results.json, or the logs of its runs, in; tables, figures, verdicts on the paper's
claims and one page out."""
