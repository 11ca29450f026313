"""The Ray Serve form: applications and serve configs. Nothing is here yet; `triform/` is what they will stand on."""
