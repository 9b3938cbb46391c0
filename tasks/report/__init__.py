"""One offline HTML page of a run: criteria, trade-offs, curves, answers, data, provenance."""
