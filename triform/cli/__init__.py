"""The `triform` command."""
