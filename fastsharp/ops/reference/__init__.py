"""The truth of every op in a few lines of torch: the oracle of the tests and the fallback where nothing is built."""
