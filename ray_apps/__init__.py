"""The Ray Serve form: `ray_apps.predict:build_app`, and `python -m ray_apps`, which starts it on this machine."""
