"""One network that learns many environments at once, without teachers."""
