"""Speed, shown by ratios against the raw client in the same run: `make bench`."""
