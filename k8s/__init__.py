"""Manifests for Kubernetes, and whether they hold."""
