"""Images, Kubernetes and monitoring: manifests and programs that deploy the forms. Tested by tests/infra."""
