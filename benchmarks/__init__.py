"""Speed and quality, measured by hand; the results are committed beside."""
