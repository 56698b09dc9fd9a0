"""What every benchmark shares: how it measures, checks, reports, and what it is run on."""
