"""Ports for this session's Ray Serve, which no other of the machine has."""

from __future__ import annotations

from ray_apps.ports import Ports, free_ports

SERVE_PORTS = Ports(*free_ports(4))
