"""The most load under an SLO: attainment, the search, the knee; sweeps over server options."""
