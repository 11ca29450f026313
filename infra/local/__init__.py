"""The Lambda form on this machine: a gateway, the Runtime API, and real `awslambdaric` processes. See gateway.py."""
