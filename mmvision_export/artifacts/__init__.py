"""What lies on disk: a model directory and its manifest, engines and libraries with their records."""
