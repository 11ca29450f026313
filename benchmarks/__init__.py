"""What we measure ourselves by; each script runs alone and prints one table. `make bench` runs them all."""
