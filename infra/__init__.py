"""Layers, images, Kubernetes and monitoring. Nothing is here yet."""
