"""Real models on real data, each with the script that made it. `make demo` runs `examples.demo`."""
