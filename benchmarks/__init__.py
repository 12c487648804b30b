"""Studies whose results are committed under ``results/``; they are run by hand, not by the tests."""
