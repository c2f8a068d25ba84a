"""The Ray Serve app: recommendations, feedback and new items over HTTP, on weights that change underneath."""
