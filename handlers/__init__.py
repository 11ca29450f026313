"""The Lambda form: one file per function. Nothing is here yet; `triform/` is what its handlers will stand on."""
